"""Maps and scores of image sets; thresholds from held-out normals; metrics of a test set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import paddle

from engine.batches import Source, in_order
from metrics import threshold as thresholds
from metrics.acontrario import AContrario
from metrics.binned import BinnedPixels
from metrics.drift import NormalNll
from metrics.nfa import calibrate as fit_nulls
from metrics.nfa import standard_nulls
from metrics.suite import Metrics, evaluate, examine_masks
from metrics.threshold import Threshold, is_defective
from utils.config import Config
from utils.errors import UserError
from utils.predictions import Output, joined

Extract = Callable[[paddle.Tensor], list[paddle.Tensor]]
ReadMask = Callable[[int], np.ndarray | None]  # image -> (H, W) bool; None: not known


class Pixels(NamedTuple):
    """Hold of every test image what its metrics rest on, (H, W) each; `nfa` where there is a test.

    A mask is None where it is not known.
    """

    maps: list[np.ndarray]
    masks: list[np.ndarray | None]
    nfa: list[np.ndarray]


class Evaluation(NamedTuple):
    """Hold the metrics of a test set, and of every image its score and verdict (None: no cut).

    deciding: what the image threshold is compared with, the score or the highest -log10 NFA.
    """

    metrics: Metrics
    scores: np.ndarray  # (N,)
    verdicts: list[bool | None]
    deciding: list[float]
    pixels: Pixels


@dataclass(frozen=True)
class Calibration:
    """What normal images say: thresholds, the maps' colour scale, the NFA test, their own NLL."""

    image: Threshold
    pixel: Threshold
    color_scale: tuple[float, float]  # the map values at the ends of the colour map
    acontrario: AContrario | None = None
    nll: NormalNll | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "image": self.image.to_dict(),
            "pixel": self.pixel.to_dict(),
            "color_scale": list(self.color_scale),
            "nfa": self.acontrario.to_dict() if self.acontrario else None,
            "nll": self.nll.to_dict() if self.nll else None,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` wrote."""
        image, pixel = Threshold.from_dict(data["image"]), Threshold.from_dict(data["pixel"])
        low, high = data["color_scale"]
        nfa = AContrario.from_dict(data["nfa"]) if data.get("nfa") else None
        nll = NormalNll.from_dict(data["nll"]) if data.get("nll") else None
        return cls(image, pixel, (float(low), float(high)), nfa, nll)


def run(
    detector: paddle.nn.Layer, images: np.ndarray, extract: Extract | None = None
) -> Output:  # fmt: skip
    """Return what the detector says of images (B, 3, H, W) in [0, 1].

    `extract` gives their features: a faster way to those of the detector.
    """
    given = paddle.to_tensor(images)
    with paddle.no_grad():
        return _output(detector(given) if extract is None else detector.score(extract(given)))


def _output(tensors: Sequence[paddle.Tensor]) -> Output:
    anomaly_map, score, nll, *evidence = (tensor.numpy() for tensor in tensors)
    return Output(anomaly_map[:, 0], score, evidence, nll)


def infer(
    detector: paddle.nn.Layer, source: Source, batches: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, Output]]:
    """Yield (indices (B,), output) for every batch of indices of the source."""
    detector.eval()
    for indices, features in zip(batches, source.pyramids(batches), strict=True):
        with paddle.no_grad():
            output = _output(detector.score(features))
        yield indices, output


def score_all(detector: paddle.nn.Layer, source: Source, batch_size: int) -> Output:
    """Return the output of all images of a source."""
    batches = in_order(source.count, batch_size)
    return joined([part for _, part in infer(detector, source, batches)])


def calibrate(
    detector: paddle.nn.Layer, holdout: Source, config: Config, train: Source | None = None
) -> Calibration:
    """Fit thresholds and the NFA test on held-out normal images.

    `train` is needed for the pixel threshold `fair`, which comes from the training images.
    """
    settings = config.eval
    output = score_all(detector, holdout, settings.batch_size)
    test = fit_acontrario(detector, output.evidence, config)

    def train_maps() -> np.ndarray:
        if train is None:
            raise UserError("eval.pixel_threshold 'fair' needs the training images; train again")
        return score_all(detector, train, settings.batch_size).maps

    return calibration_of(
        output, test, settings.image_threshold, settings.pixel_threshold, train_maps
    )


def calibration_of(
    output: Output,
    test: AContrario | None,
    image_policy: str,
    pixel_policy: str,
    train_maps: Callable[[], np.ndarray],
) -> Calibration:
    """Return what held-out normal images say by their output.

    `train_maps` gives those of the training images, for the pixel threshold `fair`.
    """
    peaks = np.zeros(0)
    if test is not None and "nfa" in (image_policy, pixel_policy):
        peaks = np.array([nfa_map.max() for nfa_map in nfa_maps(test, output.evidence)])
    image = _image_threshold(output.scores, peaks, image_policy)
    if pixel_policy == "fair":
        pixel = thresholds.fair(train_maps())
    else:
        pixel = _pixel_threshold(output.maps, peaks, pixel_policy)
    shown = pixel  # the middle of the colour map
    if pixel.policy == "nfa":
        shown = thresholds.pixel_percentile(output.maps)
    low = float(np.median(output.maps))
    span = max(shown.value - low, 1e-6)
    normal = None if output.nll is None else NormalNll.fit(output.nll)
    return Calibration(image, pixel, (low, low + 2 * span), test, normal)


def fit_acontrario(
    detector: paddle.nn.Layer, evidence: Sequence[np.ndarray], config: Config
) -> AContrario | None:
    """Return the NFA test of section `nfa`, its null hypothesis from held-out evidence."""
    settings = config.nfa
    if settings.method == "none":
        return None
    channels = [int(count) for count in detector.flow.latent_channels]
    nulls = standard_nulls(channels)
    if settings.calibrate and settings.method == "tree":
        nulls = fit_nulls(evidence, channels)
    return AContrario(
        settings.method, config.model.input_size, tuple(channels), tuple(nulls),
        tail=settings.tail, tests=settings.tests, window=settings.window,
        probability=settings.probability, high_precision=settings.high_precision,
    )  # fmt: skip


def nfa_maps(test: AContrario, evidence: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return -log10 NFA (H, W) of every image from the evidence (B, h, w) of its levels."""
    count = len(evidence[0])
    return [test.score([level[i] for level in evidence]).astype(np.float32) for i in range(count)]


def _image_threshold(scores: np.ndarray, peaks: np.ndarray, policy: str) -> Threshold:
    name, value = thresholds.parse_policy(policy)
    if name == "percentile" and value is not None:
        return thresholds.percentile(scores, value)
    return _given(name, value, peaks, "eval.image_threshold")


def _pixel_threshold(maps: np.ndarray, peaks: np.ndarray, policy: str) -> Threshold:
    name, value = thresholds.parse_policy(policy, default_percentile=99.9)
    if name == "percentile" and value is not None:
        return thresholds.pixel_percentile(maps, value)
    return _given(name, value, peaks, "eval.pixel_threshold")


def _given(name: str, value: float | None, peaks: np.ndarray, key: str) -> Threshold:
    if name == "nfa" and peaks.size:
        return thresholds.nfa(peaks)
    if name != "fixed" or value is None:
        raise UserError(
            f"{key} is '{name}'; a threshold comes from normal images or from you: use "
            f"percentile:q or fixed:v ({name} is only shown in reports)"
        )
    return thresholds.fixed(value)


def evaluate_set(
    outputs: Iterable[tuple[np.ndarray, Output]],
    labels: Sequence[int],
    read_mask: ReadMask,
    names: Sequence[str],
    *,
    calibration: Calibration | None,
    allow_missing_masks: bool = False,
    binned: bool = False,
) -> Evaluation:
    """Return all metrics of a labelled test set from its outputs, in order.

    Maps are resized to the masks: the size of a mask decides where pixels are compared. `binned`
    keeps no map, so that a set of any size fits; see `metrics.binned`.
    """
    if binned:
        return _evaluate_binned(
            outputs, labels, read_mask, names, calibration, allow_missing_masks=allow_missing_masks
        )
    maps: list[np.ndarray] = []
    nfa: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    scores = np.empty(len(labels), np.float32)
    test = calibration.acontrario if calibration else None
    for indices, output in outputs:
        scores[indices] = output.scores
        found = nfa_maps(test, output.evidence) if test else []
        for place, index in enumerate(indices):
            mask = read_mask(int(index))
            masks.append(mask)
            size = output.maps.shape[1:] if mask is None else mask.shape
            maps.append(_resized(output.maps[place], size))
            nfa += [_resized(found[place], size)] if test else []
    metrics = evaluate(
        scores,
        labels,
        maps,
        masks,
        image_threshold=None if calibration is None else calibration.image,
        pixel_threshold=None if calibration is None else calibration.pixel,
        names=names,
        allow_missing_masks=allow_missing_masks,
        nfa_maps=nfa or None,
    )
    by_nfa = calibration is not None and calibration.image.policy == "nfa"
    deciding = [float(value) for value in ([m.max() for m in nfa] if by_nfa else scores)]
    verdicts = _verdicts(deciding, calibration)
    return Evaluation(metrics, scores, verdicts, deciding, Pixels(maps, masks, nfa))


def _verdicts(deciding: list[float], calibration: Calibration | None) -> list[bool | None]:
    if calibration is None:
        return [None] * len(deciding)
    return [is_defective(value, calibration.image) for value in deciding]


def _evaluate_binned(
    outputs: Iterable[tuple[np.ndarray, Output]],
    labels: Sequence[int],
    read_mask: ReadMask,
    names: Sequence[str],
    calibration: Calibration | None,
    *,
    allow_missing_masks: bool,
) -> Evaluation:
    if calibration is not None and "nfa" in (calibration.image.policy, calibration.pixel.policy):
        raise UserError("--binned: thresholds of policy nfa need whole maps; leave it out")
    pixels = BinnedPixels(None if calibration is None else calibration.pixel)
    scores = np.empty(len(labels), np.float32)
    marked: list[bool | None] = [None] * len(labels)
    for indices, output in outputs:
        scores[indices] = output.scores
        for anomaly_map, index in zip(output.maps, indices.tolist(), strict=True):
            mask = read_mask(index)
            if mask is not None:
                marked[index] = bool(mask.any())
                anomaly_map = _resized(anomaly_map, mask.shape)
            if mask is not None or not labels[index]:
                pixels.add(anomaly_map, mask, names[index])
    metrics = evaluate(
        scores, labels, image_threshold=None if calibration is None else calibration.image,
        names=names,
    )  # fmt: skip
    defective = np.asarray(labels, bool)
    found = pixels.metrics(any_defective=bool(defective.any()))
    _, reason, warnings = examine_masks(marked, defective, names, allow_missing_masks)
    if reason:
        metrics = metrics.with_pixels(dict.fromkeys(found.values, reason), warnings)
    else:
        limits = ", ".join(f"{name} {bound:.1g}" for name, bound in found.bounds.items())
        warnings += [f"binned: the exact values differ by at most {limits}"] if limits else []
        metrics = metrics.with_pixels(found.values, warnings)
    deciding = [float(score) for score in scores]
    verdicts = _verdicts(deciding, calibration)
    return Evaluation(metrics, scores, verdicts, deciding, Pixels([], [], []))


def _resized(anomaly_map: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if anomaly_map.shape == size:
        return anomaly_map
    return cv2.resize(anomaly_map, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
