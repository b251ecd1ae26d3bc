"""Maps and scores of image sets; thresholds from held-out normals; metrics of a test set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import paddle

from engine.batches import Read, in_order, read_ahead
from metrics import threshold as thresholds
from metrics.suite import Metrics, evaluate
from metrics.threshold import Threshold
from utils.errors import UserError

ReadMask = Callable[[int], np.ndarray | None]  # image -> (H, W) bool; None: not known


@dataclass(frozen=True)
class Calibration:
    """What held-out normal images say: both thresholds, and the colour scale of the maps."""

    image: Threshold
    pixel: Threshold
    color_scale: tuple[float, float]  # the map values at the ends of the colour map

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` wrote."""
        image, pixel = Threshold.from_dict(data["image"]), Threshold.from_dict(data["pixel"])
        low, high = data["color_scale"]
        return cls(image, pixel, (float(low), float(high)))


def infer(
    detector: paddle.nn.Layer, read: Read, batches: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (indices (B,), maps (B, H, W), scores (B,)) for every batch of image indices."""
    detector.eval()
    for indices, (images,) in zip(batches, read_ahead(batches, read), strict=True):
        yield indices, *run(detector, images)


def run(detector: paddle.nn.Layer, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps (B, H, W) and scores (B,) of images (B, 3, H, W) in [0, 1]."""
    with paddle.no_grad():
        anomaly_maps, scores = detector(paddle.to_tensor(images))
    return anomaly_maps.numpy()[:, 0], scores.numpy()


def score_all(
    detector: paddle.nn.Layer, read: Read, count: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps (N, H, W) and scores (N,) of `count` images."""
    results = list(infer(detector, read, in_order(count, batch_size)))
    maps = np.concatenate([maps for _, maps, _ in results])
    return maps, np.concatenate([scores for _, _, scores in results])


def calibrate(
    detector: paddle.nn.Layer, read: Read, count: int, batch_size: int, image: str, pixel: str
) -> Calibration:
    """Fit thresholds by the policies `image` and `pixel` on held-out normal images."""
    maps, scores = score_all(detector, read, count, batch_size)
    pixel_threshold = _pixel_threshold(maps, pixel)
    low = float(np.median(maps))
    span = max(pixel_threshold.value - low, 1e-6)
    return Calibration(
        _image_threshold(scores, image), pixel_threshold, (low, low + 2 * span)
    )  # the middle of the colour map is the pixel threshold


def _image_threshold(scores: np.ndarray, policy: str) -> Threshold:
    name, value = thresholds.parse_policy(policy)
    if name == "percentile" and value is not None:
        return thresholds.percentile(scores, value)
    return _fixed(name, value, "eval.image_threshold")


def _pixel_threshold(maps: np.ndarray, policy: str) -> Threshold:
    name, value = thresholds.parse_policy(policy, default_percentile=99.9)
    if name == "percentile" and value is not None:
        return thresholds.pixel_percentile(maps, value)
    return _fixed(name, value, "eval.pixel_threshold")


def _fixed(name: str, value: float | None, key: str) -> Threshold:
    if name != "fixed" or value is None:
        raise UserError(
            f"{key} is '{name}'; a threshold comes from normal images or from you: use "
            "percentile:q or fixed:v (f1 is only shown in reports)"
        )
    return thresholds.fixed(value)


def evaluate_set(
    detector: paddle.nn.Layer,
    read: Read,
    labels: Sequence[int],
    read_mask: ReadMask,
    names: Sequence[str],
    *,
    batch_size: int,
    calibration: Calibration | None,
    allow_missing_masks: bool = False,
) -> tuple[Metrics, np.ndarray]:
    """Return all metrics and the scores (N,) of a labelled test set.

    Maps are resized to the masks: the size of a mask decides where pixels are compared.
    """
    maps: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    scores = np.empty(len(labels), np.float32)
    for indices, batch_maps, batch_scores in infer(
        detector, read, in_order(len(labels), batch_size)
    ):
        scores[indices] = batch_scores
        for index, anomaly_map in zip(indices, batch_maps, strict=True):
            mask = read_mask(int(index))
            masks.append(mask)
            maps.append(anomaly_map if mask is None else _resized(anomaly_map, mask.shape))
    metrics = evaluate(
        scores,
        labels,
        maps,
        masks,
        image_threshold=None if calibration is None else calibration.image,
        pixel_threshold=None if calibration is None else calibration.pixel,
        names=names,
        allow_missing_masks=allow_missing_masks,
    )
    return metrics, scores


def _resized(anomaly_map: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if anomaly_map.shape == size:
        return anomaly_map
    return cv2.resize(anomaly_map, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
