"""Frozen features on disk: extracted once, memory-mapped in every epoch.

Each key has a folder of its own with one `level<i>.npy` per tap and `meta.json`. Nothing else
refers to these folders: delete any of them, or all, whenever no training runs.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.errors import UserError
from utils.files import atomic_folder, recover_folder
from utils.image import Size

_VERSION = 1
_BLOCKS, _BLOCK_BYTES = 64, 4096  # sampled per level when a cache is opened


class FeatureCache:
    """Features of n images: per level a read-only (n, C, H, W) float32 array on disk."""

    def __init__(self, levels: list[np.ndarray]) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, indices: np.ndarray) -> list[np.ndarray]:
        """Copy the features at an array of indices: per level (len(indices), C, H, W)."""
        wanted = np.asarray(indices)
        return [np.asarray(level[wanted]) for level in self.levels]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Per level (C, H, W)."""
        return [level.shape[1:] for level in self.levels]

    @classmethod
    def open(cls, folder: Path, key: str) -> "FeatureCache | None":
        """Open the cache of `key`; None if there is none or it is stale, cut off or damaged.

        Damage is looked for in the file sizes and in evenly spaced samples of every level.
        """
        home = _home(folder, key)
        recover_folder(home)
        try:
            meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
            if (meta["version"], meta["key"]) != (_VERSION, key):
                return None
            return cls([_open_level(home / level["file"], level) for level in meta["levels"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def build(
        cls, folder: Path, key: str, n: int, batches: Iterator[list[np.ndarray]]
    ) -> "FeatureCache":
        """Write the features of `n` images, per batch a list of (B, C_i, H_i, W_i), and open them.

        The cache appears whole or not at all. Raise UserError when the disk is full.
        """
        home = _home(folder, key)
        try:
            with atomic_folder(home) as temporary:
                levels = _write_levels(temporary, n, batches)
                meta = {"version": _VERSION, "key": key, "levels": levels}
                (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _disk_full(folder) from error
        cache = cls.open(folder, key)
        if cache is None:
            raise UserError(f"{home}: features just written cannot be read back; check the disk")
        return cache


def cache_key(
    paths: Sequence[Path],
    size: Size,
    method: str,
    backbone: str,
    taps: Sequence[str | int],
    weight_hash: str,
) -> str:
    """Return the sha256 over everything that features depend on, the bytes of all images included.

    The order of the images matters, their names and folders do not.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        images = list(pool.map(file_digest, paths))
    parts = [_VERSION, list(size), method, backbone, list(taps), weight_hash, images]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read this file: {error.strerror}") from error


def _home(folder: Path, key: str) -> Path:
    return folder / key[:16]


def _open_level(path: Path, expected: dict[str, Any]) -> np.ndarray:
    if path.stat().st_size != expected["bytes"] or _sample_digest(path) != expected["sample"]:
        raise ValueError(f"{path} is damaged")
    level = np.load(path, mmap_mode="r")
    if level.dtype != np.float32 or list(level.shape) != expected["shape"]:
        raise ValueError(f"{path} is not what meta.json says")
    return level


def _sample_digest(path: Path) -> str:
    """Hash evenly spaced blocks of a file, its first and last bytes included."""
    last = max(path.stat().st_size - _BLOCK_BYTES, 0)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _write_levels(
    folder: Path, n: int, batches: Iterator[list[np.ndarray]]
) -> list[dict[str, Any]]:
    """Append batch after batch to one .npy per level; return what meta.json says about them.

    Plain writes, because a full disk kills a process that writes through a memory map.
    """
    files: list[BinaryIO] = []
    shapes: list[list[int]] = []
    written = 0
    try:
        for batch in batches:
            if not files:
                shapes = [[n, *level.shape[1:]] for level in batch]
                _require_space(folder, shapes)
                files = [_start_level(folder, i, shape) for i, shape in enumerate(shapes)]
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
    return [_describe(_level_path(folder, i), shape) for i, shape in enumerate(shapes)]


def _level_path(folder: Path, index: int) -> Path:
    return folder / f"level{index}.npy"


def _start_level(folder: Path, index: int, shape: list[int]) -> BinaryIO:
    file = _level_path(folder, index).open("wb")
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _describe(path: Path, shape: list[int]) -> dict[str, Any]:
    size = path.stat().st_size
    return {"file": path.name, "shape": shape, "bytes": size, "sample": _sample_digest(path)}


def _require_space(folder: Path, shapes: list[list[int]]) -> None:
    needed = sum(4 * int(np.prod(shape)) for shape in shapes)
    if needed > shutil.disk_usage(folder).free:
        raise _disk_full(folder.parent, needed)


def _disk_full(folder: Path, needed: int = 0) -> UserError:
    size = f" ({needed / 1e9:.2f} GB)" if needed else ""
    return UserError(
        f"{folder}: no space for the feature cache{size}; delete old caches there, "
        "choose another folder or train without the cache"
    )
