"""U-Flow of the official code and of anomalib: names, and what shapes say of the network.

    there                                              here
    flow.module_list.{m}.                              levels.{l}.{k}.
    feature_extractor.feature_normalizations.{l}.      norms.{l}.
    flow.module_list.{m}.downsample_kernel             nothing: the constant of a pixel shuffle

Below those: `common.STEP_NAMES`. The numbers m run over all nodes of the graph, from the coarsest
level to the finest; between two levels three of them split, double and join.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from utils.errors import UserError

from . import common
from .common import Arrays, Flow

WHAT = "U-Flow"
NORM = "feature_extractor.feature_normalizations."
KERNEL = "downsample_kernel"
_BETWEEN = 3  # nodes between two levels


def read(arrays: Arrays, given: Mapping[str, Any]) -> Flow:
    """Read the flow, without the backbone; `given` are the user's values of section `model`."""
    arrays = {k: a for k, a in common.modern(arrays).items() if not k.endswith(KERNEL)}
    groups = _levels(common.numbers(arrays, r"flow\.module_list\.(\d+)\."))
    depth = common.equal_counts(map(len, groups), WHAT)
    places = {
        f"flow.module_list.{number}.": f"levels.{level}.{step}."
        for level, group in enumerate(groups)
        for step, number in enumerate(group)
    }
    norms = {}
    if any(name.startswith(NORM) for name in arrays):
        norms = {
            f"{NORM}{level}.{leaf}": f"norms.{level}.{leaf}"
            for level in range(len(groups))
            for leaf in ("weight", "bias")
        }
    common.check_names(arrays, [*common.step_keys(places, arrays), *norms], WHAT)
    head, permute = common.read_steps(arrays, places)
    head |= {own: arrays[name] for name, own in norms.items()}
    sizes = common.kernels(arrays, places, WHAT)
    if any(size != (1 if place % depth % 2 else 3) for place, size in enumerate(sizes)):
        raise UserError(f"{WHAT}: kernels {sizes}; every level must have 3 and 1 in turn")
    clamp, notes = common.clamp_of(arrays, given)
    ratio = common.hidden_ratio(arrays, places, WHAT)
    model = {
        "flow": "uflow", "steps": depth, "hidden_ratio": ratio, "permute": permute,
        "norm": "layer" if norms else "none", **clamp,
    }  # fmt: skip
    widths = [head[f"levels.{level}.0.affine.scale"].size for level in range(len(groups))]
    maps = [arrays[name].shape[1:] for name in norms if name.endswith(".weight")]
    about = (
        f"U-Flow, {len(groups)} levels of {depth} steps, hidden ratio {ratio:g}, "
        f"norm {model['norm']}, {permute} permutations"
    )
    return Flow(model, head, _feature_channels(widths), maps, about, notes)


def _levels(numbers: list[int]) -> list[list[int]]:
    """Cut the numbers of the steps where others lie between them; finest level first."""
    groups: list[list[int]] = [numbers[:1]]
    for before, number in pairwise(numbers):
        if number - before not in (1, _BETWEEN + 1):
            raise UserError(f"{WHAT}: steps have the numbers {numbers}, which is no U-Flow")
        if number - before > 1:
            groups.append([])
        groups[-1].append(number)
    return groups[::-1]


def _feature_channels(widths: list[int]) -> list[int]:
    """Return the channels of the features, from those of the levels, finest first.

    A level of V channels hands ⌊V/8⌋·4 of them up, a quarter as many at double size.
    """
    return [
        width - (widths[level + 1] // 8 if level + 1 < len(widths) else 0)
        for level, width in enumerate(widths)
    ]
