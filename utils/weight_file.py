"""One way to read any file of weights: what it is, is found in its content, not in its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .safe_arrays import MAX_HEADER, one_line, open_zip, read_npz, read_safetensors, shown
from .safe_pickle import NAME_TABLE, load_pickle
from .stand_ins import Incomplete
from .torch_file import MAGIC, read_torch

FORMS = "PyTorch (.pt, .pth, .ckpt, .bin), .pdparams, .safetensors, .npz"
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where checkpoints keep the weights
HEAD = 512  # bytes
SHOWN = 6  # entries in a message


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds; nothing in it was executed.

    Attributes:
        form: `torch`, `torch (before 1.6)`, `pdparams`, `safetensors` or `npz`.
        content: nested dicts, lists and tuples of read-only arrays and plain values.
        skipped: what is not in `content`, each `path.to.the.entry (module.Class)`.
    """

    path: Path
    form: str
    content: Any
    skipped: list[str]


def read_weight_file(path: Path) -> WeightFile:
    """Read a file of weights of any form; `UserError` of one line if that cannot be done."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file of weights is needed: {FORMS}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold weights: {FORMS}")
    form = _form(path)
    if form == "safetensors":
        return WeightFile(path, form, read_safetensors(path), [])
    if form == "npz":
        return WeightFile(path, form, read_npz(path), [])
    if form == "pdparams":
        return WeightFile(path, form, *load_pickle(path))
    return WeightFile(path, form, *read_torch(path))


def _form(path: Path) -> str:
    with one_line(path, "weight"):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head[:2] == b"PK":
            with open_zip(path) as archive:
                is_numpy = all(name.endswith(".npy") for name in archive.entries)
            return "npz" if is_numpy else "torch"
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
            return "safetensors"
        if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
            is_torch = MAGIC.to_bytes(10, "little") in head[:40]
            return "torch (before 1.6)" if is_torch else "pdparams"
        raise UserError(_what_else(head, size))


def _what_else(head: bytes, size: int) -> str:
    """Say why a file that is in none of the forms is none."""
    if size == 0:
        return "is empty; copy it again"
    if head[257:262] == b"ustar":
        return (
            "is a tar archive, as torch.save wrote before 0.2; load it in PyTorch where you trust "
            "it, and save its state dict with torch.save"
        )
    text = head.decode("utf-8", "ignore").strip()
    if text.startswith("version https://git-lfs"):
        return "stands for a file in Git LFS; fetch that with: git lfs pull"
    if text.startswith("<"):
        return "looks like a web page; download it again"
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"is a text and no file of weights: {FORMS}"
    return f"is no file of weights, or its beginning is damaged; readable are {FORMS}"


def tensors(content: Any, *, at: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return the flat state dict in the content of a weight file.

    It is `content[at[0]][at[1]]...` (a number picks from a list); without `at` the content itself
    if that is flat, or else what it has under the first of `NESTED`. Raise `UserError` that lists
    what is there if there is no such dict, or if an object in it was left out.
    """
    found = content
    for depth, step in enumerate(at):
        entries = _entries(found)
        if step not in entries:
            place = shown(".".join(at[:depth])) or "the file"
            raise UserError(f"{place} has no entry {shown(step)}; there are: {_listed(found)}")
        found = entries[step]
    if not at and isinstance(found, dict) and not _is_flat(found):
        found = next((found[name] for name in NESTED if isinstance(found.get(name), dict)), found)
    if isinstance(found, Incomplete):
        raise UserError(f"the state dict holds what is no tensor: {'; '.join(found.missing[:3])}")
    if not isinstance(found, dict) or not found or not _is_flat(found):
        raise UserError(f"a flat state dict is needed, name -> tensor; there are: {_listed(found)}")
    return {key: _array(value) for key, value in found.items() if key != NAME_TABLE}


def _entries(content: Any) -> dict[str, Any]:
    if isinstance(content, list | tuple):
        return {str(number): value for number, value in enumerate(content)}
    return content if isinstance(content, dict) else {}


def _is_flat(found: dict[Any, Any]) -> bool:
    return all(
        isinstance(key, str) and isinstance(_array(value), np.ndarray)
        for key, value in found.items()
        if key != NAME_TABLE
    )


def _array(value: Any) -> Any:
    """Return the array of an entry; Paddle writes nested ones as (name, array)."""
    is_named = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    return value[1] if is_named else value


def _listed(content: Any) -> str:
    """Describe the entries of a content in a few words."""
    if not isinstance(content, dict | list | tuple):
        return f"no entries, but a {_kind(content)}"
    entries = list(_entries(content).items())
    names = [f"{shown(key)} ({_kind(value)})" for key, value in entries[:SHOWN]]
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return (", ".join(names) or "no entries") + more


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
