"""What the families of checkpoints share: coupling steps of FrEIA, names, sizes read off shapes.

C channels of a step, of which the first C1 = C − ⌊C/2⌋ go into its network.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import UserError

Arrays = Mapping[str, np.ndarray]

# name in a file -> name here; a file of FrEIA's, of gathierry's or of anomalib's
STEP_NAMES = {
    "global_scale": "affine.scale",
    "global_offset": "affine.offset",
    "w_perm": "affine.permutation",
    "subnet.0.weight": "subnet.first.weight",
    "subnet.0.bias": "subnet.first.bias",
    "subnet.2.weight": "subnet.second.weight",
    "subnet.2.bias": "subnet.second.bias",
}
INVERSE = "w_perm_inv"
BACK_NAMES = {  # of the second network of FastFlow-Paddle's steps
    name.replace("subnet", "subnet_2"): own.replace("subnet", "subnet_back")
    for name, own in STEP_NAMES.items()
    if name.startswith("subnet")
}
# older names: FrEIA 0.2's, and anomalib's, whose convolutions stand behind padding layers
_ALIASES = (
    (r"(^|\.)w$", r"\1w_perm"),
    (r"(^|\.)w_inv$", r"\1w_perm_inv"),
    (r"(^|\.)s\.(\d+)\.", r"\1subnet.\2."),
    (r"(^|\.)(subnet(?:_2)?)\.1\.", r"\1\2.0."),
    (r"(^|\.)(subnet(?:_2)?)\.4\.", r"\1\2.2."),
)
_NEAR = 1e-3  # how far a stored rotation may be from orthogonal


@dataclass(frozen=True)
class Flow:
    """A flow read from a file: values for section `model`, arrays under our names, a description.

    `channels` are those of the features, finest level first; `sizes` (H, W) where the file knows
    them, else empty. `notes` are lines for the user.
    """

    model: dict[str, Any]
    head: dict[str, np.ndarray]
    channels: list[int]
    sizes: list[tuple[int, int]]
    about: str
    notes: tuple[str, ...] = ()


def modern(arrays: Arrays) -> dict[str, np.ndarray]:
    """Bring the names of a step's entries to those of today's FrEIA."""
    renamed = {}
    for name, array in arrays.items():
        for old, new in _ALIASES:
            name = re.sub(old, new, name)
        renamed[name] = array
    return renamed


def numbers(arrays: Arrays, pattern: str) -> list[int]:
    """Return the numbers that group 1 of `pattern` takes in the names, in order, each once."""
    found = (re.match(pattern, name) for name in arrays)
    return sorted({int(match[1]) for match in found if match})


def check_names(arrays: Arrays, expected: Iterable[str], what: str) -> None:
    """Raise `UserError`, one line with all that is missing or unknown."""
    wanted = set(expected)
    faults = [
        f"{word}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if names[8:] else ''}"
        for word, names in (
            ("missing", sorted(wanted - set(arrays))),
            ("unknown", sorted(set(arrays) - wanted)),
        )
        if names
    ]
    if faults:
        raise UserError(f"{what}: {'; '.join(faults)}; the file is of another network")


def read_steps(
    arrays: Arrays, prefixes: Mapping[str, str], *, back: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Return coupling steps under our names, and `hard` or `soft`, how they mix channels.

    `prefixes` maps where a step begins in the file -> where ours does. With `back` there is the
    second network of two-sided steps.
    """
    table = STEP_NAMES | (BACK_NAMES if back else {})
    head, mixings = {}, {}
    for foreign, ours in prefixes.items():
        for name, own in table.items():
            array = arrays[foreign + name]
            if own == "affine.permutation":
                mixings[ours] = mixing(array, arrays.get(foreign + INVERSE), foreign + name)
            elif own.startswith("affine."):
                head[ours + own] = array.reshape(-1)
            else:
                head[ours + own] = array
    soft = any(mix.ndim == 2 for mix in mixings.values())
    for ours, mix in mixings.items():
        if not soft:
            head[f"{ours}affine.permutation"] = mix
        else:
            matrix = mix if mix.ndim == 2 else np.eye(len(mix), dtype=np.float32)[mix]
            head[f"{ours}affine.rotation"] = matrix
    return head, "soft" if soft else "hard"


def step_keys(prefixes: Iterable[str], arrays: Arrays, *, back: bool = False) -> list[str]:
    """Return the names that steps at these prefixes have; the inverse mixing may be left out."""
    table = STEP_NAMES | (BACK_NAMES if back else {})
    keys = [prefix + name for prefix in prefixes for name in table]
    return keys + [p + INVERSE for p in prefixes if p + INVERSE in arrays]


def mixing(forward: np.ndarray, inverse: np.ndarray | None, name: str) -> np.ndarray:
    """Return indices (C,) int64 of y_i = v_π(i), or the matrix (C, C) of a rotation y = W·v.

    Taken are index vectors and matrices, (C, C) or (C, C, 1, 1), exactly one-hot for indices.
    `UserError` if it is neither, or if `inverse` does not undo it.
    """
    mix = _indices_or_matrix(forward, name)
    if mix.ndim == 2:
        gap = float(np.abs(mix @ mix.T - np.eye(len(mix))).max())
        if not gap < _NEAR:
            raise UserError(
                f"{name}: neither a permutation nor a rotation (W·Wᵀ is {gap:.2g} from 1); "
                "the file is damaged or of another network"
            )
    if inverse is None:
        return mix
    back = _indices_or_matrix(inverse, f"{name}_inv")
    if mix.ndim != back.ndim:
        undone = False
    elif mix.ndim == 1:
        undone = np.array_equal(back[mix], np.arange(len(mix)))
    else:
        undone = bool(np.abs(mix.T - back).max() < _NEAR)
    if not undone:
        raise UserError(f"{name}_inv: does not undo {name}; the file is damaged")
    return mix


def _indices_or_matrix(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 1:
        index = array.astype(np.int64)
        if not np.array_equal(np.sort(index), np.arange(len(index))):
            raise UserError(f"{name}: not a permutation of 0 to {len(index) - 1}")
        return index
    side = len(array)
    if array.size != side * side:
        raise UserError(f"{name}: shape {list(array.shape)} is no square matrix")
    matrix = array.reshape(side, side)
    ones = matrix == 1
    if np.all(ones | (matrix == 0)) and np.all(ones.sum(0) == 1) and np.all(ones.sum(1) == 1):
        return matrix.argmax(1)
    return matrix.astype(np.float32)


def has_index_vectors(arrays: Arrays) -> bool:
    """Tell whether permutations are index vectors, which FrEIA writes since June 2023."""
    return any(name.endswith("w_perm") and array.ndim == 1 for name, array in arrays.items())


def clamp_of(arrays: Arrays, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return section `model`'s clamp, if the form of the file tells it, and what to say of it.

    FrEIA stores index vectors since 20 June 2023, and divides by α since 17 August 2023.
    """
    if not has_index_vectors(arrays) or "clamp" in given:
        return {}, ()
    note = (
        "permutations are index vectors, so the file is of FrEIA after June 2023: clamp "
        "tanh_scaled, its formula since August 2023; --clamp tanh is the one before"
    )
    return {"clamp": "tanh_scaled"}, (note,)


def grid(arrays: Arrays, pattern: str, levels: Sequence[int], what: str) -> dict[str, str]:
    """Return where each step begins, `pattern` with level and step in it -> `levels.{l}.{k}.`."""
    steps = [numbers(arrays, pattern.format(level, r"(\d+)")) for level in levels]
    depth = equal_counts(map(len, steps), what)
    return {
        pattern.format(level, step): f"levels.{level}.{step}."
        for level in levels
        for step in range(depth)
    }


def hidden_ratio(arrays: Arrays, prefixes: Iterable[str], what: str) -> float:
    """Return the shortest r with hidden = int(inputs · r) for the networks of all steps."""
    nets = [f"{p}{net}.0.weight" for p in prefixes for net in ("subnet", "subnet_2")]
    seen = {(arrays[name].shape[1], arrays[name].shape[0]) for name in nets if name in arrays}
    least = max(hidden / inputs for inputs, hidden in seen)
    for digits in range(7):
        ratio = math.ceil(round(least * 10**digits, 9)) / 10**digits
        if all(int(inputs * ratio) == hidden for inputs, hidden in seen):
            return ratio
    raise UserError(f"{what}: (inputs, hidden channels) {sorted(seen)} have no one ratio")


def kernels(arrays: Arrays, prefixes: Iterable[str], what: str) -> list[int]:
    """Return the kernel size of each step."""
    sizes = [arrays[f"{prefix}subnet.0.weight"].shape[-1] for prefix in prefixes]
    if set(sizes) - {1, 3}:
        raise UserError(f"{what}: kernels of size {sorted(set(sizes) - {1, 3})}; known are 1 and 3")
    return sizes


def equal_counts(counts: Iterable[int], what: str) -> int:
    """Return the number of steps that all levels have."""
    found = set(counts)
    if len(found) != 1 or not min(found):
        raise UserError(f"{what}: levels of {sorted(found)} steps; all must have the same number")
    return found.pop()
