"""ROC, precision-recall and overlap curves from rankings, thinned to what a chart can show."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metrics.roc import Ranking, last_of_ties

COLUMNS = 200  # of a chart; more points would fall on the same place


class Curve(NamedTuple):
    """Hold the points of a curve, both (P,) in [0, 1], x ascending."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def roc(ranking: Ranking) -> Curve:
    """Return true-positive over false-positive rate; needs both kinds."""
    count = ranking.positives.size
    return thinned(_rising(ranking, np.arange(1, count + 1) / count))


def overlap(ranking: Ranking, weights: NDArray[np.float64], end: float = 0.3) -> Curve:
    """Return the mean overlap of regions over the false-positive rate, up to its limit `end`.

    weights: as ranked in, of `RegionPixels`.
    """
    curve = _rising(ranking, np.minimum(np.cumsum(weights[ranking.order]), 1.0))
    inside = np.searchsorted(curve.x, end)  # the next point may be far away
    x = np.append(curve.x[:inside], end)
    y = np.append(curve.y[:inside], np.interp(end, curve.x, curve.y))
    return thinned(Curve(x, y))


def precision_recall(ranking: Ranking) -> Curve:
    """Return precision over recall in steps, as average precision adds them; needs positives."""
    last = last_of_ties(ranking.positives)
    true = last + 1
    recall, precision = true / ranking.positives.size, true / (true + ranking.not_below[last])
    x = np.stack([np.append(0, recall[:-1]), recall], axis=1).reshape(-1)
    return thinned(Curve(x, np.repeat(precision, 2)))


def thinned(curve: Curve) -> Curve:
    """Keep the first, the last, the lowest and the highest point in each column of a chart."""
    end = float(curve.x[-1]) or 1.0
    columns = np.minimum(curve.x / end * COLUMNS, COLUMNS - 1).astype(np.int64)
    starts = np.flatnonzero(np.append(True, np.diff(columns) > 0))
    kept = set()
    for start, stop in zip(starts, [*starts[1:], columns.size], strict=True):
        part = curve.y[start:stop]
        kept |= {start, stop - 1, start + int(part.argmin()), start + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return Curve(curve.x[chosen], curve.y[chosen])


def _rising(ranking: Ranking, heights: NDArray[np.float64]) -> Curve:
    """Return the curve that has `heights` (P,) after each positive; ties are one slope."""
    last = last_of_ties(ranking.positives)
    x = np.stack([ranking.above[last], ranking.not_below[last]], axis=1) / ranking.negatives
    y = np.stack([np.append(0, heights[last[:-1]]), heights[last]], axis=1)
    return Curve(np.r_[0.0, x.reshape(-1), 1.0], np.r_[0.0, y.reshape(-1), 1.0])
