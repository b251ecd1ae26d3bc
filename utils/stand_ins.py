"""What stands for Python objects while a pickle is read, and the plain content made of it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import UserError
from .safe_arrays import shown

MAX_DEPTH = 64
MAX_BITS = 2048  # of a whole number
COPIES = 4  # times the size of the file that its arrays may add up to, each by itself
SLACK = 256 << 20  # bytes that even a small file may take: expanded tensors
PLAIN = (type(None), bool, int, float, complex, str, bytes)


class Budget:
    """What a file of `size` bytes may grow to in memory."""

    def __init__(self, size: int) -> None:
        self.left = COPIES * size + SLACK
        self.parts = size + 100_000  # each takes a byte at least, unless it is referred to again

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UserError("refused: its arrays would take many times the size of the file")

    def part(self) -> None:
        self.parts -= 1
        if self.parts < 0:
            raise UserError("refused: its parts refer to each other again and again")


class StandIn:
    """Stand for a Python object while a pickle is read."""

    def set_state(self, state: Any) -> None:
        """Take what the pickle adds to the object; by default ignore it."""


class Foreign(StandIn):
    """Name an object of some library: whatever is done to it has no effect."""

    def __init__(self, name: str) -> None:
        self.name = name


class Label(Foreign):
    """Name a constant that its name says all of, such as torch.float32."""


class Known(Foreign):
    """Name a function or class for which a function of ours stands in."""

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        super().__init__(name)
        self.build = build


class Pending(StandIn):
    """Hold what an array is made of until all of the file is read."""

    def array(self, budget: Budget) -> np.ndarray:
        raise NotImplementedError


class Incomplete(dict[Any, Any]):
    """Be a dict that lacks the entries in `missing`, each as `path (what it is)`."""

    missing: list[str]


def as_key(key: Any) -> Any:
    """Return what is plain and quick to hash as it is; anything else becomes a stand-in."""
    if key is None or type(key) in (str, bytes, bool, float) or isinstance(key, Foreign):
        return key
    if type(key) is int and -(1 << 63) <= key < 1 << 63:
        return key
    return Foreign(f"a {type(key).__name__} as a key")


def plain(content: Any, budget: Budget, remedy: str) -> tuple[Any, list[str]]:
    """Return a tree of plain values and arrays, and what of it is left out.

    An entry of a dict that is or holds a foreign object is left out; that dict is `Incomplete`.
    The tree shares nothing but arrays, so walking it takes a time that the file's size bounds.
    Raise `UserError` if the whole is foreign, too deep, or not a tree of reasonable size.
    """
    skipped: list[str] = []
    tree = _plain(content, budget, (), skipped)
    if isinstance(tree, Foreign):
        raise UserError(f"holds a whole {tree.name}; a state dict is needed; {remedy}")
    return tree, skipped


def _plain(value: Any, budget: Budget, path: tuple[str, ...], skipped: list[str]) -> Any:
    budget.part()
    if len(path) > MAX_DEPTH:
        raise UserError(f"refused: nested more than {MAX_DEPTH} deep at {'.'.join(path[:3])}")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise UserError(f"refused: a number of {value.bit_length()} bits at {'.'.join(path)}")
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Label):
        return value.name
    if isinstance(value, Pending):
        return value.array(budget)
    if isinstance(value, dict):
        return _plain_dict(value, budget, path, skipped)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item, budget, (*path, str(i)), skipped) for i, item in enumerate(value)]
        foreign = [item for item in items if isinstance(item, Foreign)]
        return foreign[0] if foreign else type(value)(items)
    return value if isinstance(value, Foreign) else Foreign(f"a {type(value).__name__}")


def _plain_dict(
    value: dict[Any, Any], budget: Budget, path: tuple[str, ...], skipped: list[str]
) -> dict[Any, Any]:
    made, missing = {}, []
    for key, entry in value.items():
        name = key.name if isinstance(key, Foreign) else shown(key)
        item = key if isinstance(key, Foreign) else _plain(entry, budget, (*path, name), skipped)
        if isinstance(item, Foreign):
            missing.append(f"{'.'.join((*path, name))} ({item.name})")
        else:
            made[key] = item
    if not missing:
        return made
    skipped += missing
    incomplete = Incomplete(made)
    incomplete.missing = missing
    return incomplete
