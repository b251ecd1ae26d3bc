"""CFLOW-AD of the official code and of anomalib: names, and what shapes say of the network.

    there                                              here
    decoders.{l}.module_list.{k}.                      levels.{l}.{k}.
    decoders.{l}.module_list.{k}.subnet.0.weight       subnet.first.weight, .code_weight: its
                                                       columns of C1 features, then of the code

Below those: `common.STEP_NAMES`. The official file has one list entry per decoder.
"""

from collections.abc import Mapping
from typing import Any

from utils.errors import UserError

from . import common
from .common import Arrays, Flow

WHAT = "CFLOW-AD"
FIRST = "subnet.first.weight"


def read(arrays: Arrays, given: Mapping[str, Any]) -> Flow:
    """Read the decoders, without the encoder; `given` are the user's values of section `model`."""
    arrays = common.modern(arrays)
    levels = common.numbers(arrays, r"decoders\.(\d+)\.")
    places = common.grid(arrays, "decoders.{}.module_list.{}.", levels, WHAT)
    common.check_names(arrays, common.step_keys(places, arrays), WHAT)
    head, permute = common.read_steps(arrays, places)
    channels = [head[f"levels.{level}.0.affine.scale"].size for level in levels]
    code = head[f"levels.0.0.{FIRST}"].shape[1] - (channels[0] - channels[0] // 2)
    for place in places.values():
        count = head[f"{place}affine.scale"].size
        _split_first(head, place, count - count // 2, code)
    depth = len(places) // len(levels)
    clamp, notes = common.clamp_of(arrays, given)
    model = {
        "flow": "cflow", "steps": depth, "code_channels": code, "permute": permute, **clamp,
    }  # fmt: skip
    about = (
        f"CFLOW-AD, {len(levels)} level(s) of {depth} steps, position code of {code} channels, "
        f"{permute} permutations"
    )
    return Flow(model, head, channels, [], about, notes)


def _split_first(head: dict, place: str, features: int, code: int) -> None:
    """Cut the first matrix (2·(C1 + P), C1 + P) into the columns of features and of the code."""
    name = place + FIRST
    weight = head[name]
    if weight.shape != (2 * (features + code), features + code) or code < 0 or code % 4:
        raise UserError(
            f"{WHAT}: '{name}' has shape {list(weight.shape)}; from {features} channels and a "
            f"position code, a multiple of 4, it must be twice as many rows as columns"
        )
    head[name] = weight[:, :features]
    if code:
        head[place + "subnet.first.code_weight"] = weight[:, features:]
