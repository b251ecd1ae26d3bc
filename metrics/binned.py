"""Pixel metrics of a test set that does not fit into memory: one image at a time, in bins.

Scores fall into bins by the leading bits of their float32 form, so that no range has to be known: a
bin is at most 2⁻¹¹ of its values wide. All that stays are the counts of every bin, 24 MB. What is
lost is the order within bins, and how much that can change a metric is computed and returned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metrics.aupro import label_regions, plateau_and_ramp
from metrics.iou import PixelCounts, iou_of_counts, miou_of_counts, pixel_counts
from metrics.pixels import NO_DEFECTIVE, NO_MASK, check_maps
from metrics.roc import f1_of_counts
from metrics.threshold import Threshold, is_defective

BITS = 20  # sign, eight of the exponent, eleven of the fraction
NO_ORACLE = "the best threshold for mIoU needs all maps at once"

_SIGN = np.uint32(1 << 31)
Numbers = NDArray[np.float64]


class Bounded(NamedTuple):
    """Hold values by metric, and by metric how far the exact one may be from it."""

    values: dict[str, float | str]  # or the reason why it is undefined
    bounds: dict[str, float]


class BinnedPixels:
    """Collect maps (H, W) and their masks one by one; give their pixel metrics at the end.

    threshold: of a pixel, for the metrics at one threshold, which are exact; None leaves them out.
    """

    def __init__(self, threshold: Threshold | float | None = None) -> None:
        self._threshold = threshold
        self._normal = np.zeros(1 << BITS, np.int64)
        self._defective = np.zeros(1 << BITS, np.int64)
        self._shares = np.zeros(1 << BITS)  # of regions, a pixel of one with A pixels adds 1/A
        self._regions = 0
        self._found_shares = 0.0
        self._counts: list[PixelCounts] = []

    def add(self, anomaly_map: NDArray, mask: NDArray | None, name: str = "image") -> None:
        """Count an image; mask: defective where > 0, None for a normal image.

        Raise UserError for a map that is not finite, or a mask of another shape.
        """
        check_maps([anomaly_map], [mask], [name])
        bins = _bins(anomaly_map)
        inside = np.zeros(bins.shape, bool) if mask is None else mask > 0
        self._normal += np.bincount(bins[~inside], minlength=1 << BITS)
        if self._threshold is not None:
            self._counts.append(pixel_counts([anomaly_map], [mask], self._threshold))
        if mask is None or not inside.any():
            return
        labels, areas = label_regions(mask)
        shares = 1 / areas[labels[inside] - 1]
        np.add.at(self._defective, bins[inside], 1)
        np.add.at(self._shares, bins[inside], shares)
        self._regions += areas.size
        if self._threshold is not None:
            found = is_defective(anomaly_map[inside], self._threshold)
            self._found_shares += float(shares[found].sum())

    def metrics(
        self, limits: Sequence[float] = (0.3, 0.05), *, any_defective: bool = True
    ) -> Bounded:
        """Return pixel_auroc, pixel_ap, pixel_f1_max, AUPRO up to each limit, and the rest.

        any_defective: whether the test set has defective images, which says why masks are empty.
        """
        found = self._ranked(limits)
        values: dict[str, float | str] = {name: value for name, (value, _) in found.items()}
        bounds = {name: bound for name, (_, bound) in found.items()}
        if self._threshold is None or not self._counts:
            reason = "no pixel threshold" if self._threshold is None else NO_MASK
            values |= dict.fromkeys(("pixel_f1", "iou", "miou", "pro"), reason)
        else:
            values |= self._at_threshold()
        values["miou_oracle"] = NO_ORACLE
        if not self._regions:  # only mIoU can do without
            reason = "masks mark no defective pixels" if any_defective else NO_DEFECTIVE
            values = {name: v if "miou" in name else reason for name, v in values.items()}
        elif not self._normal.any():
            values["pixel_auroc"] = "masks leave no normal pixels"
            values |= {f"aupro_{limit:g}": "masks leave no normal pixels" for limit in limits}
        bounds = {name: bound for name, bound in bounds.items() if np.isfinite(bound)}
        return Bounded(values, bounds)

    def _ranked(self, limits: Sequence[float]) -> dict[str, tuple[float, float]]:
        filled = np.flatnonzero(self._normal + self._defective)[::-1]  # worst scores first
        false, true = self._normal[filled].astype(float), self._defective[filled].astype(float)
        false_before, true_before = np.cumsum(false) - false, np.cumsum(true) - true
        total = true.sum()
        with np.errstate(divide="ignore", invalid="ignore"):  # nan: one of both is missing
            start = false_before / false.sum()
            stop = (false_before + false) / false.sum()
            shares = self._shares[filled] / self._regions
            return {
                "pixel_auroc": _area(start, stop, true / total, 1.0),
                "pixel_ap": _average_precision(true, false, true_before, false_before),
                "pixel_f1_max": _best_f1(true, false, true_before, false_before),
                **{f"aupro_{limit:g}": _area(start, stop, shares, limit) for limit in limits},
            }

    def _at_threshold(self) -> dict[str, float | str]:
        counts = PixelCounts(*(np.concatenate(each) for each in zip(*self._counts, strict=True)))
        return {
            "pixel_f1": float(f1_of_counts(*(each.sum() for each in counts))),
            "iou": iou_of_counts(counts),
            "miou": miou_of_counts(counts),
            "pro": self._found_shares / max(self._regions, 1),
        }


def _bins(anomaly_map: NDArray) -> NDArray[np.uint32]:
    """Return numbers of bins (H, W) that rise with the score."""
    values = np.ascontiguousarray(anomaly_map, np.float32) + np.float32(0)  # -0 becomes 0
    bits = values.view(np.uint32)
    rising = np.where(bits & _SIGN, ~bits, bits | _SIGN)  # the larger of two negatives has fewer
    return rising >> np.uint32(32 - BITS)


def _area(start: Numbers, stop: Numbers, heights: Numbers, limit: float) -> tuple[float, float]:
    """Return the area below a curve that rises by `heights` from start to stop, over the limit.

    A positive adds its height from somewhere between both on: in the middle, by the ramp of ties.
    """
    least, ramp = plateau_and_ramp(start, stop, limit)
    most, value = np.maximum(limit - start, 0), least + ramp
    bound = max(heights @ (most - value), heights @ ramp)
    return float(heights @ value) / limit, float(bound) / limit


def _average_precision(
    true: Numbers, false: Numbers, true_before: Numbers, false_before: Numbers
) -> tuple[float, float]:
    """Take a bin for a tie. Its first positive may come last of all, its last one first."""
    after = true_before + true
    value = true * after / np.maximum(after + false_before + false, 1)
    most = true * after / np.maximum(after + false_before, 1)
    least = true * (true_before + 1) / (true_before + 1 + false_before + false)
    bound = max((most - value).sum(), (value - least).sum())
    return float(value.sum() / true.sum()), float(bound / true.sum())


def _best_f1(
    true: Numbers, false: Numbers, true_before: Numbers, false_before: Numbers
) -> tuple[float, float]:
    """Return the best F1 at the end of a bin; within one it may at most lose no positive."""
    after = true_before + true
    missed = true.sum() - after
    value = float(f1_of_counts(after, false_before + false, missed).max(initial=0))
    most = float(f1_of_counts(after, false_before, missed).max(initial=0))
    return value, most - value
