"""The first a-contrario test of U-Flow (2022): how many latents in a window exceed a quantile.

One test per position and scale, the scales' log-probabilities added. H W per scale; logs decimal.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, gammaincinv, gammaln

from metrics.roc import check_finite
from utils.errors import UserError

Map = NDArray[np.float64]

_KNOTS = 2000
_NODES = 8  # of the quadrature between two knots
_LEAST = 1e-300  # probability: large windows would reach 0, which has no logarithm
_CUBIC = -0.75  # the free coefficient of cubic convolution in PyTorch and OpenCV


def block_score(
    latents: Sequence[NDArray],
    size: tuple[int, int],
    *,
    window: int = 5,
    probability: float = 0.9,
    high_precision: bool = False,
) -> Map:
    """Return -log10 NFA of one image, (height, width) = `size`; above 0 means detected.

    latents: per scale (C, H, W), finest first. Windows have `window` positions a side on the
    finest scale, about half as many on each next, at least 3. Source: U-Flow, 2022.
    """
    found = [exceedances(z, probability) for z in latents]
    channels = [z.shape[0] for z in latents]
    return block_score_of_counts(
        found, channels, size, window=window, probability=probability,
        high_precision=high_precision,
    )  # fmt: skip


def exceedance_level(probability: float) -> float:
    """Return the χ²_1 quantile: a squared latent is below it with this probability."""
    return 2.0 * float(gammaincinv(0.5, probability))


def exceedances(latent: NDArray, probability: float) -> Map:
    """Count at every position (H, W) the channels of a latent (C, H, W) that are exceptional.

    These are squared latents not below `exceedance_level(probability)`.
    """
    check_finite(latent, "latents")
    return (np.square(latent) >= exceedance_level(probability)).sum(0).astype(np.float64)


def block_score_of_counts(
    found: Sequence[NDArray],
    channels: Sequence[int],
    size: tuple[int, int],
    *,
    window: int = 5,
    probability: float = 0.9,
    high_precision: bool = False,
) -> Map:
    """Return what `block_score` does, from per scale the exceedances (H, W) and the channels."""
    if window < 2 or not 0 < probability < 1:
        raise UserError(
            f"window {window}, probability {probability}: the window must have at least 2 "
            "positions, the probability must lie between 0 and 1"
        )
    positions = sum(counts.size for counts in found)
    total = np.full(size, np.log10(positions))
    for scale, (counts, channel_count) in enumerate(zip(found, channels, strict=True)):
        half = max(window // 2 ** (scale + 1), 1)
        log_p = window_log_probability(counts, channel_count, half, probability, high_precision)
        rows, columns = (cubic_matrix(*pair) for pair in zip(counts.shape, size, strict=True))
        total += rows @ log_p @ columns.T
    return -total


def window_log_probability(
    found: NDArray, channels: int, half: int, probability: float, high_precision: bool
) -> Map:
    """Return (H, W) the log-probability of so many exceedances in windows of 2·half + 1.

    found: (H, W) exceedances of a position; their number is the mean over channels. High precision
    does not round it down.
    """
    found = check_finite(found, "exceedances of latents").astype(np.float64)
    if min(found.shape) <= half:
        raise UserError(f"latents {found.shape}: too small for a window of {2 * half + 1}")
    padded = np.pad(found, half, mode="reflect")
    side = 2 * half + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    cells = side * side
    # The tail is strict, so that all of a window would have probability 0.
    mean = np.minimum(windows.sum((2, 3)) / channels, cells - 1e-9)
    if high_precision:
        return continuous_log_tail(mean, cells, probability)
    floor = np.floor(mean)
    tail = betainc(floor + 1, cells - floor, 1 - probability)  # P(Bin(cells, 1 - p) > floor)
    return np.log10(np.maximum(tail, _LEAST))


def continuous_log_tail(count: NDArray, cells: int, probability: float) -> Map:
    """Return log ∫ from count to `cells` of C(cells, t)·(1-p)^t·p^(cells-t) dt, any shape.

    C is extended by the gamma function. Read from a table, exact to 1e-7.
    """
    table = _tail_table(cells, probability)
    return (table(count) + np.log(cells - count)) / np.log(10)


@lru_cache(maxsize=16)
def _tail_table(cells: int, probability: float) -> Callable[[NDArray], NDArray]:
    """Tabulate ln(mean density from k to cells), which is smooth up to the end of the range."""
    from scipy.interpolate import CubicSpline  # slow to import, seldom needed

    knots = np.linspace(0, cells, _KNOTS)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = (knots[1] - knots[0]) / 2
    t = knots[:-1, None] + half * (nodes + 1)  # (knots - 1, nodes)
    areas = half * (np.exp(_log_density(t, cells, probability)) @ weights)
    tails = np.cumsum(areas[::-1])[::-1]
    means = np.log(tails / (cells - knots[:-1]))
    return CubicSpline(knots, np.append(means, _log_density(knots[-1:], cells, probability)))


def _log_density(t: NDArray, cells: int, probability: float) -> Map:
    choices = gammaln(cells + 1) - gammaln(t + 1) - gammaln(cells - t + 1)
    return choices + t * np.log1p(-probability) + (cells - t) * np.log(probability)


def cubic_matrix(small: int, large: int) -> Map:
    """Return the (large, small) matrix of cubic convolution with align_corners, edges repeated."""
    position = np.arange(large) * ((small - 1) / max(large - 1, 1))
    left = np.floor(position).astype(np.int64)
    matrix = np.zeros((large, small))
    for tap in range(-1, 3):
        weight = _cubic_kernel(np.abs(position - left - tap))
        np.add.at(matrix, (np.arange(large), np.clip(left + tap, 0, small - 1)), weight)
    return matrix


def _cubic_kernel(x: NDArray) -> Map:
    a = _CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
