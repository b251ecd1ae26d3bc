"""CS-Flow of the official code, its Korean fork and anomalib: names, and what shapes say.

    there                                              here
    module_list.{m}.s1., .s2. (official, fork)         blocks.{k}.to_second., .to_first.
    graph.graph.module_list.{m}.cross_convolution1.,   blocks.{k}.to_second., .to_first.
        .cross_convolution2. (anomalib)

Below those: `CONVOLUTIONS`, and gamma0 to gamma2. The numbers m run over all nodes of the graph.
Permutations are in none of the files; they are drawn anew.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.flows.csflow import SCALES, block_permutations
from utils.errors import UserError

from . import common
from .common import Arrays, Flow

WHAT = "CS-Flow"
# the network of the first half is the one that changes the second
NETWORKS = {
    "s1": "to_second", "s2": "to_first",
    "cross_convolution1": "to_second", "cross_convolution2": "to_first",
}  # fmt: skip
CONVOLUTIONS = {
    **{f"conv_scale{scale}_0": f"enter.{scale}" for scale in range(SCALES)},
    **{f"conv_scale{scale}_1": f"direct.{scale}" for scale in range(SCALES)},
    "up_conv10": "up.0", "up_conv21": "up.1", "down_conv01": "down.0", "down_conv12": "down.1",
}  # fmt: skip
_NETWORK = re.compile(rf"((?:graph\.graph\.)?module_list\.(\d+)\.({'|'.join(NETWORKS)})\.)")


def read(arrays: Arrays, given: Mapping[str, Any]) -> Flow:
    """Read the flow; `given` are the user's values of section `model`.

    Of those `permutation` and `use_gamma` count. Without the latter, networks whose γ are all
    exactly 0 are taken for some that never used them.
    """
    names = _names(arrays)
    common.check_names(arrays, names, WHAT)
    gammas = [name for name, own in names.items() if ".gamma." in own]
    use_gamma = bool(given.get("use_gamma", any(arrays[name].any() for name in gammas)))
    dropped = () if use_gamma else gammas
    head = {own: arrays[name] for name, own in names.items() if name not in dropped}
    shapes = _entering(head)
    channels = shapes[0][1] + head["blocks.0.to_second.enter.0.weight"].shape[1]
    foreign = "anomalib" if any("cross_convolution" in name for name in arrays) else "official"
    form = given.get("permutation", foreign)
    for block in range(len(shapes)):
        for scale, order in enumerate(block_permutations(block, channels, form)):
            head[f"blocks.{block}.permutation{scale}"] = np.asarray(order)
    model = {
        "flow": "csflow", "blocks": len(shapes), "hidden": shapes[0][0], "permutation": form,
        "last_kernel": shapes[-1][2], "use_gamma": use_gamma,
    }  # fmt: skip
    about = (
        f"CS-Flow, {len(shapes)} block(s), {model['hidden']} hidden channels, last kernel "
        f"{model['last_kernel']}, {'with' if use_gamma else 'without'} gamma"
    )
    note = f"permutations are not in the file: drawn anew in the {form} way"
    return Flow(model, head, [channels] * SCALES, [], about, (note,))


def _names(arrays: Arrays) -> dict[str, str]:
    """Return the names that a file with these networks has -> ours."""
    found = sorted({match.groups() for name in arrays if (match := _NETWORK.match(name))})
    order = sorted({int(number) for _, number, _ in found})
    names = {}
    for place, number, network in found:
        own = f"blocks.{order.index(int(number))}.{NETWORKS[network]}."
        for convolution, layer in CONVOLUTIONS.items():
            for leaf in ("weight", "bias"):
                names[f"{place}{convolution}.{leaf}"] = f"{own}{layer}.{leaf}"
        for scale in range(SCALES):
            names[f"{place}gamma{scale}"] = f"{own}gamma.{scale}"
    return names


def _entering(head: Arrays) -> list[tuple[int, ...]]:
    """Return the shape of the first kernel of every block: hidden, C − ⌊C/2⌋, k, k."""
    names = [
        name for name in head if re.fullmatch(r"blocks\.\d+\.to_first\.enter\.0\.weight", name)
    ]
    shapes = [head[f"blocks.{block}.to_first.enter.0.weight"].shape for block in range(len(names))]
    if any(shape[:2] != shapes[0][:2] for shape in shapes) or {s[2] for s in shapes[:-1]} - {3}:
        raise UserError(f"{WHAT}: blocks of kernels {shapes}; all but the last must be 3×3")
    return shapes
