"""Features extracted beforehand, in the files of CS-Flow's official code, and what guards them.

For a category `c`: `<root>/c/c_scale_<i>_<train|test>.npy`, `c_labels.npy` and
`c_image_paths.npy` of the test images, and `c.json`, which says what the features depend on.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.feature_cache import file_digests
from datasets.levels import check_file, describe, full_disk_explained, open_level, write_levels
from datasets.records import DEFECTIVE, Record, subfolders
from utils.errors import UserError
from utils.files import atomic_folder, recover_folder
from utils.names import canonical_name, report_order

Part = tuple[Sequence[Record], Iterator[list[np.ndarray]]]  # images, per batch (B, C_i, H_i, W_i)

_VERSION = 1
_ARRAYS = ("labels", "image_paths")  # of the test images
_AGAIN = "extract again (extract_features.py)"


@dataclass(frozen=True)
class Extracted:
    """Features of a category: per level a read-only (N, C, H, W) float32 array on disk."""

    train: list[np.ndarray]
    test: list[np.ndarray]
    labels: np.ndarray  # (N,) of the test images: 0 good, 1..n the kinds of defect
    paths: list[str]  # of the test images
    defects: list[str]  # per test image "good" or the name of its defect
    about: dict[str, Any]  # what stands in the JSON file

    @property
    def digest(self) -> str:
        """Return the sha256 of everything that the training features depend on."""
        parts = [_VERSION, self.about["guard"], self.about["train"]["sha256"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def holdout(self) -> int:
        """Return how many of `train`, at its end, the data set sets aside for thresholds."""
        return int(self.about.get("holdout", 0))


def write(
    root: Path, name: str, guard: Mapping[str, Any], train: Part, test: Part, holdout: int = 0
) -> Path:
    """Write the features of a category below `root` and return its folder, which appears whole.

    `guard` holds, by configuration key, what features depend on apart from the images. The last
    `holdout` images of `train` are those that the data set sets aside for thresholds. A folder
    of older features is replaced. Raise UserError for a folder of anything else, a full disk or
    an unreadable image.
    """
    home = root / name
    _check_replaceable(home, name)
    explained = full_disk_explained(
        root, "extracted features", "make room there or choose another folder"
    )
    with explained, atomic_folder(home) as temporary:
        about = _write_parts(temporary, name, train, test)
        about |= {"version": _VERSION, "guard": _plain(guard), "holdout": holdout}
        text = json.dumps(about, indent=1)
        _about_file(temporary, name).write_text(text, encoding="utf-8")
    read(root, name, guard)
    return home


def read(root: Path, name: str, guard: Mapping[str, Any]) -> Extracted:
    """Open the features of a category, whose name may be an alias ("metal nut").

    Raise UserError if there are none, if any file is damaged, or for the first entry of `guard`
    with which they were not extracted.
    """
    home = _home(root, name)
    name = home.name
    file = _about_file(home, name)
    about = _read_about(file)
    try:
        _compare(file, about["guard"], _plain(guard))
        files, levels, folders = about["files"], int(about["levels"]), about["folders"]
        train, test = (
            [_open(_level_file(home, name, part, i), files, open_level) for i in range(levels)]
            for part in ("train", "test")
        )
        labels, paths = (_open(_array_file(home, name, key), files, _load) for key in _ARRAYS)
        defects = [folders[label] for label in labels]
        return Extracted(train, test, labels, paths.tolist(), defects, about)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"{file}: damaged; {_AGAIN}") from None


def names(root: Path) -> list[str]:
    """List the categories with features below `root`, in table order; UserError if none."""
    found = _guarded(root)
    if not found:
        raise UserError(f"{root}: no extracted features here; make some with extract_features.py")
    return found


def _guarded(root: Path) -> list[str]:
    folders = subfolders(root)
    return report_order(each.name for each in folders if _about_file(each, each.name).exists())


def _about_file(home: Path, name: str) -> Path:
    return home / f"{name}.json"


def _array_file(folder: Path, name: str, key: str) -> Path:
    return folder / f"{name}_{key}.npy"


def _level_file(folder: Path, name: str, part: str, level: int) -> Path:
    return _array_file(folder, name, f"scale_{level}_{part}")


def _plain(guard: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(guard)))


def _check_replaceable(home: Path, name: str) -> None:
    if home.name != name or name.startswith("."):
        raise UserError(f"category '{name}': is not the name of a folder; give another")
    if not home.exists():
        return
    own = re.compile(rf"{re.escape(name)}(_.*\.npy|\.json)|\..*")
    inside = list(home.iterdir()) if home.is_dir() else [home]
    strange = sorted(path.name for path in inside if path.is_dir() or not own.fullmatch(path.name))
    if strange:
        raise UserError(
            f"{home}: holds {', '.join(strange[:3])}, which extracted features would replace; "
            "choose another folder"
        )


def _write_parts(folder: Path, name: str, train: Part, test: Part) -> dict[str, Any]:
    """Write all arrays; return what the JSON file says about images and arrays."""
    folders = ["good", *sorted({r.defect for r in test[0] if r.label == DEFECTIVE})]
    described: list[dict[str, Any]] = []
    for part, (records, batches), more in (("train", train, len(test[0])), ("test", test, 0)):
        if not records and described:  # a category without test images
            batches = iter([[np.empty((0, *each["shape"][1:]), np.float32) for each in described]])
        path_of = partial(_level_file, folder, name, part)
        described += write_levels(path_of, len(records), batches, more)
    labels = np.array([folders.index(r.defect) for r in test[0]], np.int64)
    paths = np.array([str(r.path) for r in test[0]], np.str_)
    for key, array in zip(_ARRAYS, (labels, paths), strict=True):
        data = io.BytesIO()  # np.save gives a full disk no error number
        np.save(data, array, allow_pickle=False)
        path = _array_file(folder, name, key)
        path.write_bytes(data.getvalue())
        described.append(describe(path, list(array.shape)))
    return {
        "folders": folders,
        "levels": len(described) // 2 - 1,
        "train": {**_about_images(train[0]), "images": [str(r.path) for r in train[0]]},
        "test": _about_images(test[0]),
        "files": {each["file"]: each for each in described},
    }


def _about_images(records: Sequence[Record]) -> dict[str, Any]:
    """Return the number of images and the sha256 over those of all their files, in order."""
    digests = file_digests([record.path for record in records])
    return {
        "count": len(records),
        "sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
    }


def _home(root: Path, name: str) -> Path:
    """Return the folder of a category; `UserError` if there is none."""
    recover_folder(root / name)
    wanted = canonical_name(name)
    found = subfolders(root)
    exact = [folder for folder in found if folder.name == name]
    chosen = exact or [folder for folder in found if canonical_name(folder.name) == wanted]
    if not chosen:
        known = ", ".join(_guarded(root)) or "none"
        raise UserError(
            f"{root}: no features of '{name}' (found: {known}); make them with extract_features.py"
        )
    return chosen[0]


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent}: no {file.name}, so nothing guards these arrays: they may come from "
            f"another backbone or image size (CS-Flow's own code writes none); {_AGAIN}"
        ) from None
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("version") != _VERSION:
        raise UserError(f"{file}: damaged or of another version; {_AGAIN}")
    return about


def _compare(file: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in dict.fromkeys([*wanted, *stored]):
        if stored.get(key) != wanted.get(key):
            raise UserError(
                f"{file}: features were extracted with {key} {_shown(stored.get(key))}, the "
                f"config has {_shown(wanted.get(key))}; {_AGAIN} or change the config"
            )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _open(
    path: Path, files: Mapping[str, dict[str, Any]], reader: Callable[..., np.ndarray]
) -> np.ndarray:
    try:
        return reader(path, files[path.name])
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {_AGAIN}") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: damaged; {_AGAIN}") from None


def _load(path: Path, expected: dict[str, Any]) -> np.ndarray:
    check_file(path, expected)
    return np.load(path, allow_pickle=False)
