"""Time the a-contrario test, or the same with a tree of Python objects."""

from collections.abc import Callable, Sequence

import cv2
import networkx as nx  # type: ignore[import-untyped]  # comes with scikit-image
import numpy as np
from numpy.typing import NDArray
from skimage.morphology import max_tree

from benchmarks.measure import own_arguments, report
from metrics.nfa import (
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
SIDE = 256  # of the score map
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


def score_maps(shapes: Shapes, side: int = SIDE) -> dict[str, Callable[[], NDArray]]:
    """Return by side what goes from latents of these shapes to a map (side, side)."""
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

    return {"ours": ours, "networkx tree": naive}


def main() -> None:
    """Measure one side on the layout that the case names."""
    options = own_arguments(__doc__)
    score_map = score_maps(LAYOUTS[options.case])[options.side]

    def call() -> dict[str, float]:
        score = score_map()
        return {"highest": float(score.max()), "lowest": float(score.min()), "mean": score.mean()}

    report(call, options.repeat)


if __name__ == "__main__":
    main()
