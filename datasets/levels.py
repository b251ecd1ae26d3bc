"""Features of many images on disk: one .npy per level, written batch by batch, checked later."""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.errors import UserError

_BLOCKS, _BLOCK_BYTES = 64, 4096  # sampled per file when it is opened
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_levels(
    path_of: Callable[[int], Path], n: int, batches: Iterator[list[np.ndarray]], more: int = 0
) -> list[dict[str, Any]]:
    """Append batches, each a list of (B, C_i, H_i, W_i), to the file `path_of(i)` of each level.

    Return a description of every file, for `check_file`. Raise OSError without space for these
    `n` images and `more` of the same size, before the first is written; ValueError if there are
    not `n` or if shapes change.
    """
    # Plain writes, because a full disk kills a process that writes through a memory map.
    files: list[BinaryIO] = []
    shapes: list[list[int]] = []
    written = 0
    try:
        for batch in batches:
            if not files:
                shapes = [[n, *level.shape[1:]] for level in batch]
                _require_space(path_of(0).parent, shapes, n + more)
                files = [_start_level(path_of(i), shape) for i, shape in enumerate(shapes)]
            if [list(level.shape[1:]) for level in batch] != [shape[1:] for shape in shapes]:
                raise ValueError(f"features changed their shape after {written} images")
            for file, level in zip(files, batch, strict=True):
                file.write(np.ascontiguousarray(level, dtype=np.float32).data)
            written += len(batch[0])
    finally:
        for file in files:
            file.close()
    if written != n or not files:
        raise ValueError(f"features of {written} images were given, {n} were announced")
    return [describe(path_of(i), shape) for i, shape in enumerate(shapes)]


def open_level(path: Path, expected: dict[str, Any]) -> np.ndarray:
    """Map a level into memory, read-only (n, C, H, W) float32; ValueError if it is damaged."""
    check_file(path, expected)
    level = np.load(path, mmap_mode="r")
    if level.dtype != np.float32 or list(level.shape) != expected["shape"]:
        raise ValueError(f"{path} is not what was written")
    return level


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Compare a file with its description: size and evenly spaced samples; ValueError if not."""
    if path.stat().st_size != expected["bytes"] or _sample_digest(path) != expected["sample"]:
        raise ValueError(f"{path} is damaged")


def describe(path: Path, shape: list[int]) -> dict[str, Any]:
    """Return what `check_file` compares."""
    size = path.stat().st_size
    return {"file": path.name, "shape": shape, "bytes": size, "sample": _sample_digest(path)}


@contextlib.contextmanager
def full_disk_explained(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn the error of a full disk into a UserError; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        needed = error.needed if isinstance(error, _NoSpace) else 0
        size = f" ({needed / 1e9:.2f} GB)" if needed else ""
        raise UserError(f"{folder}: no space for {what}{size}; {remedy}") from error


class _NoSpace(OSError):
    def __init__(self, needed: int) -> None:
        super().__init__(errno.ENOSPC, "too little space")
        self.needed = needed


def _sample_digest(path: Path) -> str:
    """Hash evenly spaced blocks of a file, its first and last bytes included."""
    last = max(path.stat().st_size - _BLOCK_BYTES, 0)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _start_level(path: Path, shape: list[int]) -> BinaryIO:
    file = path.open("wb")
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _require_space(folder: Path, shapes: list[list[int]], images: int) -> None:
    needed = sum(4 * images * int(np.prod(shape[1:])) for shape in shapes)
    if needed > shutil.disk_usage(folder).free:
        raise _NoSpace(needed)
