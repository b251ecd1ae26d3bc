"""FastFlow of gathierry, anomalib and FastFlow-Paddle: names, and what shapes say of the network.

    there                                              here
    nf_flows.{l}.module_list.{k}.                      levels.{l}.{k}.
    fast_flow_blocks.{l}.module_list.{k}. (anomalib)   levels.{l}.{k}.
    norms.{l}.weight, .bias                            the same
    norms.{l}._mean, ._variance (FastFlow-Paddle)      the same

Below the first two: `common.STEP_NAMES`, and `common.BACK_NAMES` in two-sided steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import UserError

from . import common
from .common import Arrays, Flow

WHAT = "FastFlow"
ROOTS = ("nf_flows", "fast_flow_blocks")
_STATISTICS = ("_mean", "_variance")


def read(arrays: Arrays, given: Mapping[str, Any]) -> Flow:
    """Read the flow, without the backbone; `given` are the user's values of section `model`."""
    arrays = common.modern(arrays)
    root = next(root for root in ROOTS if any(name.startswith(f"{root}.") for name in arrays))
    levels = common.numbers(arrays, rf"{root}\.(\d+)\.")
    places = common.grid(arrays, root + ".{}.module_list.{}.", levels, WHAT)
    back = any("subnet_2." in name for name in arrays)
    norm, norm_names = _norms(arrays, levels)
    common.check_names(arrays, [*common.step_keys(places, arrays, back=back), *norm_names], WHAT)
    head, permute = common.read_steps(arrays, places, back=back)
    head |= {name: arrays[name] for name in norm_names}
    steps = len(places) // len(levels)
    clamp, notes = common.clamp_of(arrays, given)
    model = {
        "flow": "fastflow", "steps": steps, "coupling": "two_sided" if back else "one_sided",
        "conv3x3_only": _only_3x3(common.kernels(arrays, places, WHAT), steps), "norm": norm,
        "permute": permute, "hidden_ratio": common.hidden_ratio(arrays, places, WHAT), **clamp,
    }  # fmt: skip
    channels = [head[f"levels.{level}.0.affine.scale"].size for level in levels]
    maps = [arrays[f"norms.{level}.weight"].shape[1:] for level in levels if norm == "layer"]
    return Flow(model, head, channels, maps, _about(model, len(levels)), notes)


def _norms(arrays: Arrays, levels: Sequence[int]) -> tuple[str, list[str]]:
    """Return the kind of the norms in front of the flow, and the names of their entries."""
    own = [name for name in arrays if name.startswith("norms.")]
    if not own:
        return "none", []
    batch = any(name.endswith(_STATISTICS) for name in own)
    leaves = ("weight", "bias", *_STATISTICS) if batch else ("weight", "bias")
    names = [f"norms.{level}.{leaf}" for level in levels for leaf in leaves]
    return "batch" if batch else "layer", names


def _only_3x3(sizes: Sequence[int], steps: int) -> bool:
    in_turn = [1 if place % steps % 2 else 3 for place in range(len(sizes))]
    if set(sizes) != {3} and list(sizes) != in_turn:
        raise UserError(f"{WHAT}: kernels {sizes}; known are 3 everywhere, and 3 and 1 in turn")
    return set(sizes) == {3}


def _about(model: Mapping[str, Any], levels: int) -> str:
    kernel = "3×3" if model["conv3x3_only"] else "3-1"
    return (
        f"FastFlow, {levels} level(s) of {model['steps']} {model['coupling'].replace('_', '-')} "
        f"steps, {kernel} kernels, hidden ratio {model['hidden_ratio']:g}, norm {model['norm']}, "
        f"{model['permute']} permutations"
    )
