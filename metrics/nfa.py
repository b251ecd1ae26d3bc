"""A-contrario segmentation (U-Flow): how many false alarms a region of latents would be worth.

Null hypothesis: latents are independent standard normal. The number of false alarms (NFA) of a
region is the number of tests times the probability of a region as abnormal as this one. Scores are
-log10 NFA: above 0, less than one false detection per image is expected. H W per scale; logs are
decimal.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from metrics.nfa_tree import component_tree
from metrics.roc import check_finite
from utils.errors import UserError

Map = NDArray[np.float64]

TAILS = ("upper", "both")
# The number of polyominoes (connected regions) of r pixels is about α·β^r/r.
_ALPHA, _BETA = 0.316915, 4.062570


def tree_score(
    energies: Sequence[NDArray],
    channels: Sequence[int],
    size: tuple[int, int],
    *,
    tail: str = "upper",
) -> Map:
    """Return -log10 NFA of one image, (height, width) = `size`; above 0 means detected.

    energies: per scale (H, W), the squared latents of every position summed over the channels;
    channels: per scale. Source: U-Flow, JMIV 2024; the least probable scale counts.
    """
    _check_scales(energies, channels)
    tests = log_tests([energy.size for energy in energies])
    least = np.zeros(size)
    for energy, count in zip(energies, channels, strict=True):
        log_p = np.nan_to_num(region_log_probability(energy, count, tail=tail))
        np.minimum(least, cv2.resize(log_p, size[::-1], interpolation=cv2.INTER_LINEAR), out=least)
    return -(tests + least)


def region_log_probability(energy: NDArray, channels: int, *, tail: str = "upper") -> Map:
    """Return the log-probability of the most meaningful region around each position, (H, W).

    Regions are the connected components of {energy >= level}; nan lies outside all of those kept.
    """
    if tail not in TAILS:
        raise UserError(f"tail {tail!r}: must be one of {', '.join(TAILS)}")
    tree = component_tree(check_finite(energy, "energies of latents"))
    log_p = tree.area() * log_tail(tree.level.astype(np.float64) / channels, channels, tail=tail)
    return tree.paint(tree.most_meaningful(log_p), log_p).reshape(energy.shape)


def log_tail(mean_energy: NDArray, channels: int, *, tail: str = "upper") -> Map:
    """Return Chernoff's bound of log P(χ²_n / n >= mean_energy), n = channels, any shape.

    `upper`: 0 up to 1, where the bound says nothing. `both`: the formula below 1 too, where it
    calls unusually normal regions abnormal (the reference code, for parity).
    """
    if tail == "upper":
        mean_energy = np.maximum(mean_energy, 1.0)
    above = np.maximum(mean_energy, np.finfo(np.float64).tiny) - 1.0  # tiny: ln 0
    return -0.5 * channels / np.log(10) * (above - np.log1p(above))


def log_tests(positions: Sequence[int]) -> float:
    """Return the log of the number of tests: regions of any size anywhere, over all scales.

    positions: H·W of every scale. Source: U-Flow, JMIV 2024.
    """
    terms = []
    for count in positions:
        r = np.arange(1, count + 1)
        terms.append(np.log(_ALPHA * count) + logsumexp(r * np.log(_BETA) - np.log(r)))
    return float(logsumexp(terms) / np.log(10))


def latent_energies(latents: Sequence[NDArray]) -> list[NDArray]:
    """Return per scale (…, H, W) the sum of squares over the channels of latents (…, C, H, W)."""
    return [np.einsum("...chw,...chw->...hw", z, z) for z in latents]


def calibrate(energies: Sequence[NDArray], channels: Sequence[int]) -> NDArray[np.float64]:
    """Return the variance per scale (S,) of the latents of held-out normals, (N, H, W) each.

    Divide energies by it before `tree_score`: a flow trained on few images is over-confident,
    and leaves unseen normals with a variance above 1.
    """
    _check_scales(energies, channels)
    for energy in energies:
        check_finite(energy, "energies of held-out normals")
    means = [np.mean(energy, dtype=np.float64) for energy in energies]
    return np.array(means) / np.array(channels)


def _check_scales(energies: Sequence[NDArray], channels: Sequence[int]) -> None:
    if len(energies) != len(channels) or not all(energy.size for energy in energies):
        raise UserError(
            f"{len(energies)} scales of energies, shapes {[e.shape for e in energies]}, but "
            f"{len(channels)} channel counts: give one of each per scale, none of them empty"
        )
