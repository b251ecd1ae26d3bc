"""Exact ranking metrics of scores against binary labels: AUROC, average precision, F1."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.errors import UserError


@dataclass(frozen=True)
class Ranking:
    """Hold the positives, best first, and where the negatives stand among them.

    positives: (P,) scores, descending; order: (P,) their indices in the input of `rank`;
    above, not_below: (P,) numbers of negatives that score > and >= each of them.
    """

    positives: NDArray
    order: NDArray[np.int64]
    above: NDArray[np.int64]
    not_below: NDArray[np.int64]
    negatives: int

    def auroc(self) -> float:
        """Return the area under the ROC curve (Mann-Whitney, a tie counts one half), or nan."""
        pairs = self.positives.size * self.negatives
        if pairs == 0:
            return float("nan")
        lost_twice = int(self.above.sum()) + int(self.not_below.sum())
        return 1 - lost_twice / (2 * pairs)

    def average_precision(self) -> float:
        """Return the sum of recall steps times precision, or nan without positives."""
        if self.positives.size == 0:
            return float("nan")
        _, true, false = self._counts()
        gains = np.diff(true, prepend=0)
        return float((gains * (true / (true + false))).sum() / self.positives.size)

    def f1_max(self) -> tuple[float, float]:
        """Return the largest F1 over all thresholds t (score >= t) and the lowest t that has it."""
        if self.positives.size == 0:
            return float("nan"), float("nan")
        thresholds, true, false = self._counts()
        values = f1_of_counts(true, false, self.positives.size - true)
        best = values.size - 1 - int(values[::-1].argmax())
        return float(values[best]), float(thresholds[best])

    def _counts(self) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]:
        # A threshold between two positives only adds false alarms to the higher one, so the
        # scores of the positives are all that AP and F1 need.
        last = last_of_ties(self.positives)
        return self.positives[last], last + 1, self.not_below[last]


def rank(positives: NDArray, sorted_negatives: NDArray) -> Ranking:
    """Rank positive scores (P,) among ascending negative scores (N,), in any finite dtype."""
    order = np.argsort(positives)[::-1]
    ranked = positives[order]
    count = sorted_negatives.size
    return Ranking(
        positives=ranked,
        order=order,
        above=count - np.searchsorted(sorted_negatives, ranked, side="right"),
        not_below=count - np.searchsorted(sorted_negatives, ranked, side="left"),
        negatives=count,
    )


def rank_labelled(scores: ArrayLike, labels: ArrayLike) -> Ranking:
    """Rank the scores labelled 1 among those labelled 0; any shape, flattened."""
    values, defective = checked(scores, labels)
    return rank(values[defective], np.sort(values[~defective]))


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the exact area under the ROC curve; nan unless both labels are present."""
    return rank_labelled(scores, labels).auroc()


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the step-wise area under the precision-recall curve; nan without a label 1."""
    return rank_labelled(scores, labels).average_precision()


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Return the largest F1 when score >= t is positive, and t; (nan, nan) without a label 1.

    Equal maxima: the lowest t.
    """
    return rank_labelled(scores, labels).f1_max()


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Return (fpr, tpr, thresholds), one point per distinct score, from (0, 0) at inf to (1, 1).

    fpr is nan without a label 0, tpr without a label 1.
    """
    thresholds, true, false = _sweep(scores, labels)
    with np.errstate(invalid="ignore"):
        fpr, tpr = false / false[-1], true / true[-1]
    return fpr, tpr, thresholds


def pr_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Return (precision, recall, thresholds), one point per distinct score, from (1, 0) at inf.

    recall is nan without a label 1.
    """
    thresholds, true, false = _sweep(scores, labels)
    precision = np.ones(true.size)
    np.divide(true, true + false, out=precision, where=true + false > 0)
    with np.errstate(invalid="ignore"):
        return precision, true / true[-1], thresholds


def f1_of_counts(true: ArrayLike, false: ArrayLike, missed: ArrayLike) -> NDArray:
    """Return 2PR / (P + R + 1e-10) from true positives, false positives and false negatives."""
    found = np.asarray(true, dtype=np.float64)
    precision = found / np.maximum(found + np.asarray(false), 1)
    recall = found / np.maximum(found + np.asarray(missed), 1)
    return 2 * precision * recall / (precision + recall + 1e-10)  # 1e-10: torchmetrics, anomalib


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return flat scores and labels as booleans; a UserError unless finite, 0/1 and paired."""
    values, flags = np.asarray(scores).reshape(-1), np.asarray(labels).reshape(-1)
    if values.size != flags.size:
        raise UserError(f"{values.size} scores but {flags.size} labels: give one label per score")
    valid = (flags == 0) | (flags == 1)
    if not valid.all():
        raise UserError(
            f"label {flags[~valid][0]}: must be 0 (normal) or 1 (defective); "
            "leave out images without a label"
        )
    return check_finite(values, "scores"), flags.astype(bool)


def check_finite(values: NDArray, what: str) -> NDArray:
    """Return `values`; a UserError that counts what is NaN or infinite in `what`."""
    if not values.size or (np.isfinite(values.min()) and np.isfinite(values.max())):
        return values  # soon told, for both are NaN if any value is
    broken = values.size - np.count_nonzero(np.isfinite(values))
    if broken:
        raise UserError(
            f"{what}: {broken} of {values.size} values are NaN or infinite; "
            "a sound model gives finite numbers, so check the weights and the input"
        )
    return values


def last_of_ties(ordered: NDArray) -> NDArray[np.int64]:
    """Return the index of the last one of each run of equal values (N,)."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], ordered.size > 0))


def _sweep(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    values, defective = checked(scores, labels)
    order = np.argsort(values)[::-1]
    values, true = values[order], np.cumsum(defective[order])
    last = last_of_ties(values)
    false = last + 1 - true[last]
    thresholds = np.append(np.inf, values[last])
    return thresholds, np.append(0, true[last]), np.append(0, false)
