"""Area under the per-region-overlap curve, by the exact definition of MVTec's evaluation code."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from metrics.pixels import Maps, Masks, check_maps, sorted_background
from metrics.roc import Ranking, rank
from utils.errors import UserError


@dataclass(frozen=True)
class RegionPixels:
    """Hold all pixels of all ground-truth regions.

    scores: (P,); weights: (P,) the share of one pixel in the mean overlap, 1/(|region|·regions).
    """

    scores: NDArray
    weights: NDArray[np.float64]
    regions: int


def label_regions(mask: NDArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return 8-connected regions of mask > 0 as labels (H, W), 0 = none, and their areas (R,)."""
    binary = np.ascontiguousarray(mask > 0).view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    return labels, stats[1:, cv2.CC_STAT_AREA].astype(np.int64)


def region_pixels(maps: Maps, masks: Masks) -> RegionPixels:
    """Collect scores and weights of the pixels in the masks; the maps have passed `check_maps`."""
    scores: list[NDArray] = []
    weights: list[NDArray[np.float64]] = []
    regions = 0
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if mask is None or not (mask > 0).any():
            continue
        labels, areas = label_regions(mask)
        inside = labels > 0
        scores.append(anomaly_map[inside])
        weights.append(1 / areas[labels[inside] - 1])
        regions += areas.size
    if not regions:
        return RegionPixels(np.empty(0), np.empty(0), 0)
    return RegionPixels(np.concatenate(scores), np.concatenate(weights) / regions, regions)


def aupro(maps: Maps, masks: Masks, limits: Sequence[float] = (0.3, 0.05)) -> dict[float, float]:
    """Return {limit: area under the overlap curve up to that false-positive rate / limit}.

    maps: N of (H, W); masks: N of (H, W), defective where > 0, or None for a normal image.
    nan without a region or without background. Definition: evaluate_experiment.py of MVTec AD.
    """
    check_maps(maps, masks)
    inside = region_pixels(maps, masks)
    ranking = rank(inside.scores, sorted_background(maps, masks))
    return aupro_of_ranking(ranking, inside.weights, limits)


def aupro_of_ranking(
    ranking: Ranking, weights: NDArray[np.float64], limits: Sequence[float]
) -> dict[float, float]:
    """Return {limit: AUPRO} of region pixels ranked among the background; weights as ranked in.

    Each pixel adds its weight to the curve, linearly between the false-positive rates just before
    and just after its score: a step, or a ramp if background pixels share that score.
    """
    for limit in limits:
        if not 0 < limit <= 1:
            raise UserError(f"AUPRO limit {limit}: must be a false-positive rate above 0, up to 1")
    if not (ranking.positives.size and ranking.negatives):
        return dict.fromkeys(limits, float("nan"))
    weights = weights[ranking.order]
    start = ranking.above / ranking.negatives
    stop = ranking.not_below / ranking.negatives
    return {limit: _area(start, stop, weights, limit) for limit in limits}


def _area(
    start: NDArray[np.float64], stop: NDArray[np.float64], weights: NDArray, limit: float
) -> float:
    plateau, ramp = plateau_and_ramp(start, stop, limit)
    return min(float(weights @ (plateau + ramp)) / limit, 1.0)  # 1.0: rounding of the weights' sum


def plateau_and_ramp(
    start: NDArray[np.float64], stop: NDArray[np.float64], limit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the area, up to the limit, below what rises by 1 from start to stop: after, between.

    All (P,), rates of false positives.
    """
    width = stop - start
    covered = np.clip(limit - start, 0, width)
    ramp = np.divide(covered**2, 2 * width, out=np.zeros_like(width), where=width > 0)
    return np.maximum(limit - stop, 0), ramp
