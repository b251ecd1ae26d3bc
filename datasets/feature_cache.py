"""Frozen features on disk: extracted once, memory-mapped in every epoch.

Each key has a folder of its own with one `level<i>.npy` per tap and `meta.json`. Nothing else
refers to these folders: delete any of them, or all, whenever no training runs.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from datasets.levels import full_disk_explained, open_level, write_levels
from utils.errors import UserError
from utils.files import atomic_folder, recover_folder
from utils.image import Size

_VERSION = 1
_REMEDY = "delete old caches there, choose another folder or train without the cache"


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
            return cls([open_level(home / level["file"], level) for level in meta["levels"]])
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
        explained = full_disk_explained(folder, "the feature cache", _REMEDY)
        with explained, atomic_folder(home) as temporary:
            levels = write_levels(lambda i: temporary / f"level{i}.npy", n, batches)
            meta = {"version": _VERSION, "key": key, "levels": levels}
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
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
    images = file_digests(paths)
    parts = [_VERSION, list(size), method, backbone, list(taps), weight_hash, images]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 of the bytes of every file."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(file_digest, paths))


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read this file: {error.strerror}") from error


def _home(folder: Path, key: str) -> Path:
    return folder / key[:16]
