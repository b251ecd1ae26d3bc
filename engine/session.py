"""Runs on disk and the data they read, wired to detectors: what the scripts share.

The one module of this package that knows `models` and `datasets`; only scripts import it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from datasets.records import DEFECTIVE, NORMAL
from engine import checkpoint
from engine.batches import Source, in_order
from engine.checkpoint import Checkpoint
from engine.distributed import Part
from engine.evaluator import Calibration, Evaluation, calibrate, evaluate_set, infer
from engine.inputs import LabelledSet, known_masks
from engine.log import RunLog
from engine.trainer import Judge, Objectives, Watch
from engine.watch import watcher
from models import build_detector
from models.backbones.weights import load_weights
from models.detector import Detector
from models.flows.cflow import log_likelihoods
from models.scoring.cflow import maps_relative_to_set
from utils.config import Config, differences, override
from utils.constraints import needs_test
from utils.errors import UserError
from utils.names import canonical_name, report_order
from utils.predictions import Output

RESULTS = Path("results")
EVALUATION_MAY_CHANGE = (
    "data.root", "data.layout", "data.workers", "data.features", "eval.batch_size", "eval.size",
    "eval.norm", "nfa.high_precision", "export.dir",
)  # fmt: skip
BEST_METRICS = {"auroc": "pixel_auroc", "aupro": "aupro_0.3", "miou": "miou_oracle"}


def run_folder(exp_dir: str, category: str = "") -> Path:
    """Return the folder of a run: `exp_dir` as it is if it has a slash, else below results/."""
    base = Path(exp_dir) if re.search(r"[/\\]", exp_dir) else RESULTS / exp_dir
    same = (p for p in base.glob("*") if canonical_name(p.name) == canonical_name(category))
    return base / category if (base / category).is_dir() else next(same, base / category)


def next_exp_dir(batch_size: int) -> str:
    """Return a free name below results/: exp_<batch>_<number of runs> (FastFlow-Paddle's)."""
    number = sum(path.is_dir() for path in RESULTS.glob("*"))
    while (RESULTS / f"exp_{batch_size}_{number}").exists():
        number += 1
    return f"exp_{batch_size}_{number}"


def trained_categories(exp_dir: str) -> list[str]:
    """Return the categories of an experiment that have a checkpoint, in the order of tables."""
    found = run_folder(exp_dir).glob(f"*/last/{checkpoint.META}")
    return report_order(path.parent.parent.name for path in found)


def chosen_category(exp_dir: str, given: str | None) -> str:
    """Return the category to load: the given one, the only trained one, or bottle."""
    if given:
        return given
    trained = trained_categories(exp_dir)
    if len(trained) == 1:
        return trained[0]
    if len(trained) > 1 and "bottle" not in trained:
        raise UserError(f"{run_folder(exp_dir)}: holds {', '.join(trained)}; choose one with -cat")
    return "bottle"


def build_from(config: Config) -> Detector:
    """Build an untrained detector, without backbone weights."""
    try:
        return build_detector(
            dataclasses.asdict(config.model), config.train.seed, dataclasses.asdict(config.nfa)
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def new_detector(
    config: Config, *, allow_random: bool, weights: Path | None = None
) -> tuple[Detector, dict[str, Any]]:
    """Build an untrained detector with backbone weights; return it and where those came from.

    `weights` is a file of them, in the place of `model.weights`.
    """
    detector = build_from(config)
    if weights is None and config.model.weights:
        weights = Path(config.model.weights)
    info = load_weights(
        detector.backbone,
        weights,
        allow_random=allow_random,
        seed=config.train.seed,
    )
    return detector, dataclasses.asdict(info)


def open_detector(
    exp_dir: str, category: str, which: str
) -> tuple[Checkpoint, Detector, Calibration | None]:
    """Load a trained detector: its checkpoint, the network, and thresholds if they are fitted."""
    found = checkpoint.open_run(run_folder(exp_dir, category), which)
    trained_on = found.meta["backbone"]
    own = found.folder.parent / checkpoint.BACKBONE
    detector, info = new_detector(
        found.config,
        allow_random=trained_on["origin"] == "random",
        weights=own if own.is_file() else None,
    )
    if info["sha256"] != trained_on["sha256"]:
        raise UserError(
            f"{found.folder}: trained on backbone weights {trained_on['sha256'][:12]} "
            f"({trained_on['source']}), but {info['source']} is {info['sha256'][:12]}; "
            "put the former back or train again"
        )
    found.load_head(detector)
    detector.eval()
    stored = found.meta.get("calibration")
    return found, detector, Calibration.from_dict(stored) if stored else None


def calibrate_checkpoint(
    folder: Path, detector: Detector, holdout: Source, train: Source, config: Config
) -> Calibration:
    """Fit thresholds on held-out normals for the checkpoint in `folder`, and store them there.

    With them goes `config`, which a resumed run may have changed in part.
    """
    found = checkpoint.open_run(folder.parent, folder.name)
    found.load_head(detector)
    detector.eval()
    calibration = calibrate(detector, holdout, config, train)
    checkpoint.update_meta(found, config=config.to_dict(), calibration=calibration.to_dict())
    return calibration


def evaluation_config(trained: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides to the configuration of a run; `UserError` for what training has fixed."""
    config = override(trained, overrides)
    for name in differences(trained, config):
        if name not in EVALUATION_MAY_CHANGE:
            raise UserError(
                f"-o {name}: training has fixed it; what may change afterwards is "
                f"{', '.join(EVALUATION_MAY_CHANGE)}"
            )
    return config


def for_evaluation(calibration: Calibration | None, config: Config) -> Calibration | None:
    """Return the stored calibration with what an evaluation may set anew."""
    if calibration is None or calibration.acontrario is None:
        return calibration
    test = dataclasses.replace(calibration.acontrario, high_precision=config.nfa.high_precision)
    return dataclasses.replace(calibration, acontrario=test)


def evaluate_test(
    detector: Detector,
    test: LabelledSet,
    config: Config,
    calibration: Calibration | None,
    *,
    allow_missing_masks: bool = False,
    binned: bool = False,
) -> Evaluation:
    """Return what labelled test images give; `UserError` if there are none.

    `binned` keeps no map in memory.
    """
    if not test.records:
        raise UserError("no labelled test images: put them into test/good and test/<defect>")
    if binned and config.eval.norm != "calibrated":
        raise UserError(f"--binned: eval.norm {config.eval.norm} keeps all maps; leave one out")
    masks, differing = ([], 0) if binned else known_masks(test.records, config)

    def read_mask(index: int) -> np.ndarray | None:
        nonlocal differing
        if not binned:
            return masks[index]
        (mask,), other = known_masks([test.records[index]], config)
        differing += other
        return mask

    if config.eval.norm == "calibrated":
        batches = in_order(test.source.count, config.eval.batch_size)
        outputs = infer(detector, test.source, batches)
    else:
        calibration = None  # thresholds are made for calibrated scores
        outputs = iter([_relative_output(detector, test.source, config)])
    found = evaluate_set(
        outputs, test.labels, read_mask, [str(r.path) for r in test.records],
        calibration=calibration, allow_missing_masks=allow_missing_masks, binned=binned,
    )  # fmt: skip
    if differing:
        found.metrics.warnings.append(f"{differing} mask(s) resized to the size of their images")
    if config.eval.norm != "calibrated":
        found.metrics.warnings.append(
            f"eval.norm {config.eval.norm}: scores depend on the other test images, so no "
            "threshold applies; only for comparison with published figures"
        )
    return found


def _relative_output(
    detector: Detector, source: Source, config: Config
) -> tuple[np.ndarray, Output]:
    """Return all maps and scores of CFLOW-AD relative to the whole set or to each batch of it."""
    detector.eval()
    batches = in_order(source.count, config.eval.batch_size)
    likelihoods = []
    for features in source.pyramids(batches):
        with paddle.no_grad():
            levels = log_likelihoods(*detector.flow(features))
        likelihoods.append([level.numpy()[:, 0].astype(np.float64) for level in levels])
    if config.eval.norm == "dataset":
        likelihoods = [[np.concatenate(level) for level in zip(*likelihoods, strict=True)]]
    parts = [maps_relative_to_set(part, config.model.input_size) for part in likelihoods]
    maps, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    return np.arange(source.count), Output(maps, scores)


def test_judge(detector: Detector, test: LabelledSet, config: Config) -> Judge | None:
    """Return what follows test metrics: `best` with `select_on: test`, and the ones of `best_by`.

    For `best` that is FastFlow-Paddle's rule: the mean of both AUROCs rounded to three decimals
    decides, then pixel AUROC. All of these are optimistic.
    """
    settings = config.train
    if not needs_test(settings):
        return None
    if set(test.labels) != {NORMAL, DEFECTIVE}:
        raise UserError(
            "train.select_on test and train.best_by need normal and defective images in test/"
        )

    with_nfa = "miou" in settings.best_by and config.nfa.method != "none"

    def judge(epoch: int, train: Source, holdout: Source) -> dict[str, list[float]]:
        if epoch % settings.test_epochs and epoch != settings.epochs:
            return {}
        calibration = calibrate(detector, holdout, config, train) if with_nfa else None
        values = evaluate_test(detector, test, config, calibration).metrics.values
        wanted = {}
        if settings.select_on == "test":
            image, pixel = round(values["image_auroc"], 3), round(values["pixel_auroc"], 3)
            wanted["best"] = [image] if math.isnan(pixel) else [0.5 * image + 0.5 * pixel, pixel]
        for name in settings.best_by:
            key = "miou_nfa" if with_nfa and name == "miou" else BEST_METRICS[name]
            wanted[f"best_{name}"] = [values[key]]
        return wanted

    return judge


def test_watcher(
    detector: Detector, test: LabelledSet, config: Config, log: RunLog, every: int
) -> Watch:
    """Return what draws the state of a training every so many epochs, with test metrics if any."""

    def evaluate(calibration: Calibration) -> Evaluation:
        return evaluate_test(detector, test, config, calibration, allow_missing_masks=True)

    return watcher(detector, config, log, every, test.records, evaluate)


def training_objectives(detector: Detector, config: Config) -> Objectives | None:
    """Return how a batch is stepped on, if not at once: CFLOW-AD's fibre batches."""
    settings = config.train
    if not settings.fiber_batch:
        return None

    def objectives(features: list[Tensor], rng: np.random.Generator, part: Part) -> Iterator:
        try:
            for _, loss in detector.flow.fiber_losses(
                features, settings.fiber_batch, settings.fiber_remainder, rng,
                first=part.first, images=part.total,
            ):  # fmt: skip
                yield loss, loss
        except ValueError as error:
            raise UserError(f"train.fiber_batch: {error}") from None

    return objectives
