"""What a training shows every few epochs: latents, metrics of the test images, example maps."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import paddle

from engine.batches import Source, in_order
from engine.evaluator import Calibration, Evaluation, calibrate, infer
from engine.log import RunLog
from engine.trainer import Watch
from metrics.threshold import is_defective
from utils.config import Config
from utils.image import read_image
from utils.visualize import heat_map, panel

if TYPE_CHECKING:
    from engine.results import TestImage

MOST = 8  # held-out images whose latents are counted, and examples
NAMES = {0: "normal", 1: "defective"}


def watcher(
    detector: paddle.nn.Layer,
    config: Config,
    log: RunLog,
    every: int,
    images: Sequence["TestImage"],
    evaluate: Callable[[Calibration], Evaluation],
) -> Watch:
    """Return what shows the state of a detector after every so many epochs and after the last.

    `evaluate` judges `images`, the labelled test images; without any, held-out maps are shown.
    """

    def watch(epoch: int, train: Source, holdout: Source) -> None:
        if epoch % every and epoch != config.train.epochs:
            return
        show_latents(detector, holdout, config.eval.batch_size, log, epoch)
        calibration = calibrate(detector, holdout, config, train)
        if not images:
            show_held_out(detector, holdout, calibration, log, epoch)
            return
        found = evaluate(calibration)
        values = {key: value for key, value in found.metrics.values.items() if math.isfinite(value)}
        log.event("test", epoch, **values)
        for index in examples(images):
            show_example(images[index], found, index, calibration, log, epoch)

    return watch


def show_latents(
    detector: paddle.nn.Layer, holdout: Source, batch_size: int, log: RunLog, epoch: int
) -> None:
    """Show the latents of held-out images by level; a flow makes those of normal ones N(0, 1)."""
    detector.eval()
    found: list[list[np.ndarray]] = []
    for features in holdout.pyramids(in_order(min(holdout.count, MOST), batch_size)):
        with paddle.no_grad():
            latents, _ = detector.flow(features)
        found.append([level.numpy().ravel() for level in latents])
    numbers = {}
    for number, parts in enumerate(zip(*found, strict=True), 1):
        values = np.concatenate(parts)
        log.curves.distribution(f"latents/level_{number}", values, epoch)
        numbers[f"level_{number}_mean"] = float(values.mean(dtype=np.float64))
        numbers[f"level_{number}_std"] = float(values.std(dtype=np.float64))
    log.event("latents", epoch, **numbers)


def show_held_out(
    detector: paddle.nn.Layer, holdout: Source, calibration: Calibration, log: RunLog, epoch: int
) -> None:
    """Show the maps of held-out images on their colour scale."""
    _, output = next(infer(detector, holdout, [np.arange(min(holdout.count, MOST))]))
    for number, anomaly_map in enumerate(output.maps, 1):
        picture = heat_map(anomaly_map, *calibration.color_scale)
        log.curves.picture(f"held_out/{number}", picture, epoch)


def examples(images: Sequence["TestImage"]) -> list[int]:
    """Return the places of the first images of every kind in turn, up to `MOST`."""
    seen: dict[str, int] = {}
    turns = []
    for index, image in enumerate(images):
        seen[image.defect] = seen.get(image.defect, 0) + 1
        turns.append((seen[image.defect], index))
    return sorted(index for _, index in sorted(turns)[:MOST])


def show_example(
    image: "TestImage", found: Evaluation, index: int, calibration: Calibration, log: RunLog,
    epoch: int,
) -> None:  # fmt: skip
    """Show a test image, its map and its ground truth; nothing where the file is not at hand."""
    if not image.path.is_file():  # trained on stored features
        return
    maps, masks, nfa = found.pixels
    by_nfa = calibration.pixel.policy == "nfa"
    mask, cut = masks[index], calibration.pixel
    title = f"{NAMES[image.label]}: {image.path.parent.name}/{image.path.name}\n"
    picture = panel(
        read_image(image.path), maps[index],
        is_defective(nfa[index] if by_nfa else maps[index], cut), *calibration.color_scale,
        title + f"epoch {epoch}  score {found.scores[index]:.3f}  "
        f"threshold {calibration.image.value:.3f}",
        ground_truth=None if mask is None else mask > 0, level=None if by_nfa else cut.value,
    )  # fmt: skip
    log.curves.picture(f"examples/{image.path.parent.name}_{image.path.stem}", picture, epoch)
