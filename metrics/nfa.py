"""A-contrario segmentation (U-Flow): how many false alarms a region of latents would be worth.

Null hypothesis: the latents of every position are independent and standard normal, so that their
energy, the sum of squares over the channels, follows a χ² law. The number of false alarms (NFA) of
a region is the number of tests times the probability of a region as abnormal as this one. Scores
are -log10 NFA: above 0, less than one false detection per image is expected. H W per scale; logs
are decimal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from metrics.nfa_tree import component_tree
from metrics.roc import check_finite
from utils.errors import UserError

Map = NDArray[np.float64]

TAILS = ("upper", "both")
TESTS = ("total", "by_size")
# The number of polyominoes (connected regions) of r pixels is about α·β^r/r, and less.
_ALPHA, _BETA = 0.316915, 4.062570


class Null(NamedTuple):
    """Describe the energies of one scale without defects: their mean, and the χ² law that fits."""

    mean: float
    freedom: float


def standard_nulls(channels: Sequence[int]) -> list[Null]:
    """Return the null hypothesis of a perfect flow, per scale, from its channels."""
    return [Null(float(count), float(count)) for count in channels]


def latent_energies(latents: Sequence[NDArray]) -> list[NDArray]:
    """Return per scale (…, H, W) the sum of squares over the channels of latents (…, C, H, W)."""
    return [np.einsum("...chw,...chw->...hw", z, z) for z in latents]


def tree_score(
    energies: Sequence[NDArray],
    nulls: Sequence[Null],
    size: tuple[int, int],
    *,
    tail: str = "upper",
    tests: str = "total",
) -> Map:
    """Return -log10 NFA of one image, (height, width) = `size`; above 0 means detected.

    energies: (H, W) per scale; of scales, the least probable region counts. `tests`: how many
    there are. `total`: all regions of any size on any scale (U-Flow, JMIV 2024). `by_size`: those
    of the region's size, times the number of sizes and scales; the expected number of false
    detections has the same bound 1, and small regions need far less evidence.
    """
    _check_scales(energies, nulls, 2)
    if tests not in TESTS:
        raise UserError(f"tests {tests!r}: must be one of {', '.join(TESTS)}")
    least = np.full(size, np.inf)
    for energy, null in zip(energies, nulls, strict=True):
        by_area = np.zeros(energy.size)
        if tests == "by_size":
            by_area = log_regions(energy.size) + np.log10(len(energies) * energy.size)
        log_nfa = region_log_nfa(energy, null, by_area, tail=tail)
        log_nfa = np.fmin(log_nfa, by_area[0])  # nothing found: one position, of probability 1
        np.minimum(least, cv2.resize(log_nfa, size[::-1]), out=least)
    return -least - (log_tests([energy.size for energy in energies]) if tests == "total" else 0.0)


def region_log_nfa(
    energy: NDArray, null: Null, log_tests_by_area: NDArray, *, tail: str = "upper"
) -> Map:
    """Return log NFA of the most meaningful region around each position, (H, W), nan outside all.

    Regions are the connected components of {energy >= level}. log_tests_by_area: (H·W,) for
    regions of 1, 2, … positions; zeros leave the log-probability.
    """
    tree = component_tree(check_finite(energy, "energies of latents"))
    area = tree.area()
    level = tree.level.astype(np.float64) / null.mean
    log_nfa = area * log_tail(level, null.freedom, tail=tail)
    log_nfa += log_tests_by_area[area.astype(np.int64) - 1]
    return tree.paint(tree.most_meaningful(log_nfa), log_nfa).reshape(energy.shape)


def log_tail(ratio: NDArray, freedom: float, *, tail: str = "upper") -> Map:
    """Return Chernoff's bound of log P(energy / mean >= ratio) for a χ² law, any shape.

    `upper`: 0 up to 1, where the bound says nothing. `both`: the formula below 1 too, where it
    calls unusually normal regions abnormal (the reference code, for parity).
    """
    if tail not in TAILS:
        raise UserError(f"tail {tail!r}: must be one of {', '.join(TAILS)}")
    least = 1.0 if tail == "upper" else np.finfo(np.float64).tiny  # an energy of 0 has no logarithm
    ratio = np.maximum(ratio, least)
    return -0.5 * freedom / np.log(10) * (ratio - 1.0 - np.log(ratio))


def log_tests(positions: Sequence[int]) -> float:
    """Return the log of the number of regions of any size anywhere; positions: H·W per scale."""
    per_scale = np.concatenate([log_regions(count) for count in positions])
    return float(np.logaddexp.reduce(per_scale * np.log(10)) / np.log(10))


def log_regions(positions: int) -> Map:
    """Return the log of the number of connected regions of 1, 2, … positions, (positions,)."""
    r = np.arange(1, positions + 1)
    return np.log10(positions * _ALPHA / r) + r * np.log10(_BETA)


def calibrate(energies: Sequence[NDArray], channels: Sequence[int]) -> list[Null]:
    """Fit the null hypothesis per scale to the energies (N, H, W) of N held-out normal images.

    The mean, and as many degrees of freedom (from 1 to the channels) as give the law the energy
    that is exceeded once in all N·H·W positions: a flow trained on few images leaves unseen normals
    with another variance than 1, and with heavier tails, because their channels vary together.
    """
    _check_scales(energies, channels, 3)
    nulls = []
    for energy, count in zip(energies, channels, strict=True):
        energy = check_finite(energy, "energies of held-out normals").astype(np.float64)
        mean, rare = float(energy.mean()), 1 / energy.size
        high = float(np.quantile(energy, 1 - rare))
        nulls.append(Null(mean, _freedom(high / mean, rare, float(count))))
    return nulls


def _freedom(ratio: float, probability: float, most: float) -> float:
    """Return the degrees of freedom for which P(χ² / mean > ratio) is the probability."""
    from scipy.optimize import brentq  # slow to import, and only training needs it

    def excess(freedom: float) -> float:
        return float(chdtri(freedom, probability)) / freedom - ratio

    if excess(most) >= 0:
        return most
    return 1.0 if excess(1.0) <= 0 else float(brentq(excess, 1.0, most))


def _check_scales(energies: Sequence[NDArray], others: Sequence, axes: int) -> None:
    shapes = [energy.shape for energy in energies]
    fits = [len(s) == axes and min(s) > 0 and min(s[-2:]) > 2 for s in shapes]
    if len(shapes) != len(others) or not all(fits):
        raise UserError(
            f"energies of shapes {shapes} for {len(others)} scales: give one array of {axes} axes "
            "per scale, with at least 3 rows and 3 columns"
        )
