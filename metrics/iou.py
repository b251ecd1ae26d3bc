"""Overlap of predicted and true defect areas at one threshold: IoU, mIoU, PRO."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metrics.aupro import RegionPixels, region_pixels
from metrics.pixels import Maps, Masks, check_maps
from metrics.threshold import Threshold, is_defective

_EPS = 2.22e-16  # U-Flow: an image without defect and without detection counts 1


class PixelCounts(NamedTuple):
    """Hold true positive, false positive and false negative pixels per image, each (N,)."""

    true: NDArray[np.int64]
    false: NDArray[np.int64]
    missed: NDArray[np.int64]


def miou(maps: Maps, masks: Masks, threshold: Threshold | float) -> float:
    """Return the mean IoU over all images, normal ones included (U-Flow 2024), nan without images.

    A normal image counts 1 when nothing is detected and 0 when anything is.
    """
    check_maps(maps, masks)
    return miou_of_counts(pixel_counts(maps, masks, threshold))


def iou(maps: Maps, masks: Masks, threshold: Threshold | float) -> float:
    """Return the IoU of all pixels of all images pooled, nan without images."""
    check_maps(maps, masks)
    return iou_of_counts(pixel_counts(maps, masks, threshold))


def iou_batch10(maps: Maps, masks: Masks, threshold: Threshold | float) -> float:
    """Return the IoU pooled over batches of 10 images, then averaged (U-Flow 2022, for parity)."""
    check_maps(maps, masks)
    return _mean_iou(pixel_counts(maps, masks, threshold), batch=10)


def pro_at_threshold(maps: Maps, masks: Masks, threshold: Threshold | float) -> float:
    """Return the mean over regions of the fraction detected, nan without a region."""
    check_maps(maps, masks)
    return overlap_at_threshold(region_pixels(maps, masks), threshold)


def pixel_counts(maps: Maps, masks: Masks, threshold: Threshold | float) -> PixelCounts:
    """Count pixels with score > threshold against mask > 0 (None: a normal image)."""
    counts = np.zeros((3, len(maps)), dtype=np.int64)
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        found = is_defective(anomaly_map, threshold)
        total = np.count_nonzero(found)
        if mask is None:
            counts[:, index] = 0, total, 0
            continue
        defective = mask > 0
        hits = np.count_nonzero(found & defective)
        counts[:, index] = hits, total - hits, np.count_nonzero(defective) - hits
    return PixelCounts(*counts)


def miou_of_counts(counts: PixelCounts) -> float:
    """Return the mean over images of intersection over union, nan without images."""
    return _mean_iou(counts, batch=1)


def iou_of_counts(counts: PixelCounts) -> float:
    """Return the intersection over union of all pixels pooled, nan without images."""
    return _mean_iou(counts, batch=max(counts.true.size, 1))


def threshold_grid(maps: Maps, count: int = 1000) -> NDArray[np.float64]:
    """Return up to `count` thresholds: quantiles of the maps, half of them above the 99th."""
    pooled = np.concatenate([np.asarray(m).reshape(-1) for m in maps])
    pooled.sort()  # in place: the maps may fill the memory
    shares = np.concatenate([np.linspace(0, 0.99, count // 2), np.linspace(0.99, 1, count // 2)])
    return np.unique(pooled[(shares * (pooled.size - 1)).round().astype(np.int64)].astype(float))


def best_miou(maps: Maps, masks: Masks, thresholds: NDArray[np.float64]) -> float:
    """Return the largest mean IoU over the thresholds (T,): an oracle, for it uses the masks."""
    sums = np.zeros(thresholds.size)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        values = np.asarray(anomaly_map)
        defective = np.zeros(values.shape, bool) if mask is None else mask > 0
        true, false = (_above(values[part], thresholds) for part in (defective, ~defective))
        union = false + np.count_nonzero(defective)
        sums += (true + _EPS) / (union + _EPS)
    return float(sums.max() / len(maps))


def _above(values: NDArray, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the values above each threshold, (T,)."""
    ordered = np.sort(values, axis=None).astype(np.float64)  # ties are decided in float64
    return values.size - np.searchsorted(ordered, thresholds, side="right")


def overlap_at_threshold(pixels: RegionPixels, threshold: Threshold | float) -> float:
    """Return the mean over regions of the fraction of pixels above the threshold, or nan."""
    if not pixels.regions:
        return float("nan")
    found = pixels.weights[is_defective(pixels.scores, threshold)]
    return min(float(found.sum()), 1.0)  # 1.0: rounding of the weights' sum


def _mean_iou(counts: PixelCounts, batch: int) -> float:
    if counts.true.size == 0:
        return float("nan")
    starts = np.arange(0, counts.true.size, batch)
    overlap = np.add.reduceat(counts.true, starts)
    union = overlap + np.add.reduceat(counts.false + counts.missed, starts)
    return float(((overlap + _EPS) / (union + _EPS)).mean())
