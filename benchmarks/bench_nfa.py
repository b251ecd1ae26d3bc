"""Time the a-contrario test against a tree of Python objects, and count false alarms under H0.

python -m benchmarks.bench_nfa
"""

import argparse
from collections.abc import Sequence

import cv2
import networkx as nx  # type: ignore[import-untyped]  # comes with scikit-image
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from skimage.morphology import max_tree

from benchmarks.bench_metrics import timed
from metrics.nfa import (
    TESTS,
    Null,
    latent_energies,
    log_tail,
    log_tests,
    standard_nulls,
    tree_score,
)

LAYOUTS = {  # per scale: channels, height, width of the latents
    "mcait 448": ((816, 28, 28), (192, 14, 14)),
    "resnet18 256": ((84, 64, 64), (80, 32, 32), (128, 16, 16)),
}
VARIANCES = (0.9, 1.0, 1.1)
Shapes = Sequence[tuple[int, int, int]]


def naive_log_probability(energy: NDArray, null: Null, tail: str) -> NDArray:
    """Return log-probabilities of regions (H, W) as one would write it down from the paper."""
    tree = _naive_tree(energy)
    for node in tree:
        pixels = tree.nodes[node]["pixels"]
        least = min(energy.flat[pixel] for pixel in pixels) / np.float64(null.mean)
        log_p = len(pixels) * float(log_tail(least, null.freedom, tail=tail))
        tree.nodes[node]["log_p"] = log_p
    _prune(tree)
    while _merge(tree):
        _prune(tree)
    painted = np.full(energy.shape, np.nan)
    for node in tree:
        if tree.out_degree(node) == 0:
            painted.flat[list(tree.nodes[node]["pixels"])] = tree.nodes[node]["log_p"]
    return painted


def _naive_tree(energy: NDArray) -> nx.DiGraph:
    parents, order = max_tree(energy, connectivity=1)
    parents, flat = parents.ravel(), energy.ravel()
    tree = nx.DiGraph()
    tree.add_node(int(order[0]), pixels={int(order[0])})
    for pixel in order[1:].tolist():
        parent = int(parents[pixel])
        if flat[pixel] == flat[parent]:
            tree.nodes[parent]["pixels"].add(pixel)
        else:
            tree.add_node(pixel, pixels={pixel})
            tree.add_edge(parent, pixel)
    for node in reversed(list(tree)):  # nodes were added parents first
        for parent in tree.predecessors(node):
            tree.nodes[parent]["pixels"] |= tree.nodes[node]["pixels"]
    return tree


def _prune(tree: nx.DiGraph) -> None:
    for leaf in [node for node in tree if tree.out_degree(node) == 0]:
        chain = [leaf]
        while (above := list(tree.predecessors(chain[-1]))) and tree.out_degree(above[0]) == 1:
            chain.append(above[0])
        best = min(chain, key=lambda node: tree.nodes[node]["log_p"])
        tree.remove_nodes_from([node for node in chain if node != best])
        tree.add_edges_from((parent, best) for parent in above)


def _merge(tree: nx.DiGraph) -> bool:
    changed = False
    for node in list(tree):
        if node not in tree:
            continue
        children = list(tree.successors(node))
        if len(children) < 2 or any(tree.out_degree(child) for child in children):
            continue
        if tree.nodes[node]["log_p"] <= min(tree.nodes[child]["log_p"] for child in children):
            tree.remove_nodes_from(children)
            changed = True
    return changed


def draw(shapes: Shapes, rng: np.random.Generator, gain: float = 3.0) -> list[NDArray]:
    """Return Gaussian latents (C, H, W) float32, amplified in a square: a defect."""
    latents = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    for z in latents:
        _, height, width = z.shape
        z[:, height // 2 : height * 3 // 4, width // 2 : width * 3 // 4] *= np.float32(gain)
    return latents


def race(shapes: Shapes, side: int, repeat: int) -> tuple[float, float]:
    """Return the seconds from latents to score map, ours and those of the naive tree.

    Stop with a message unless both give the same map.
    """
    latents = draw(shapes, np.random.default_rng(0))
    nulls = standard_nulls([shape[0] for shape in shapes])

    def ours() -> NDArray:
        return tree_score(latent_energies(latents), nulls, (side, side))

    def naive() -> NDArray:
        least = np.zeros((side, side))
        energies = latent_energies(latents)
        for energy, null in zip(energies, nulls, strict=True):
            log_p = np.nan_to_num(naive_log_probability(energy, null, "upper"))
            least = np.minimum(least, cv2.resize(log_p, (side, side)))
        return -(log_tests([energy.size for energy in energies]) + least)

    score, time = timed(ours, repeat=10 * repeat)
    expected, naive_time = timed(naive, repeat=repeat)
    if not (np.allclose(score, expected, atol=1e-6) and (score > 0).any()):
        raise SystemExit("the maps differ or detect nothing: the times mean nothing")
    return time, naive_time


def false_alarms(
    shapes: Shapes, variance: float, images: int, *, tail: str = "upper", tests: str = "total",
    seed: int = 0,
) -> tuple[float, float, float]:  # fmt: skip
    """Simulate images without defects: Gaussian latents, by their energies' χ² law.

    Return the mean number of detected areas, the share of images with any, the highest score. Areas
    are connected positions of the finest scale, to which the others are resized.
    """
    rng = np.random.default_rng(seed)
    nulls = standard_nulls([shape[0] for shape in shapes])
    areas, alarmed, highest = 0, 0, -np.inf
    for _ in range(images):
        energies = [variance * rng.chisquare(channels, size) for channels, *size in shapes]
        score = tree_score(energies, nulls, energies[0].shape, tail=tail, tests=tests)
        areas += int(label(score > 0)[1])
        alarmed += bool((score > 0).any())
        highest = max(highest, float(score.max()))
    return areas / images, alarmed / images, highest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="simulated per setting")
    parser.add_argument("--side", type=int, default=256, help="of the score map")
    parser.add_argument("--repeat", type=int, default=3, help="naive calls; the best counts")
    options = parser.parse_args()
    for shapes in LAYOUTS.values():
        for part in (shapes[:1], shapes):
            time, naive_time = race(part, options.side, options.repeat)
            text = " + ".join("x".join(map(str, shape)) for shape in part)
            print(
                f"{text:32} {1e3 * time:7.2f} ms, networkx {1e3 * naive_time:7.1f} ms = "
                f"{naive_time / time:.0f} times"
            )
    print(f"\n{options.images} images of Gaussian latents: detected areas per image (bound: 1)")
    settings = [("upper", tests, v) for tests in TESTS for v in VARIANCES]
    for name, shapes in LAYOUTS.items():
        for tail, tests, variance in [*settings, ("both", "total", 0.9)]:
            mean, share, highest = false_alarms(
                shapes, variance, options.images, tail=tail, tests=tests
            )
            print(
                f"{name:12} tail {tail:5} tests {tests:7} variance {variance:.1f}: "
                f"{mean:.3f} areas, {share:.1%} of images, highest -log10 NFA {highest:.1f}"
            )


if __name__ == "__main__":
    main()
