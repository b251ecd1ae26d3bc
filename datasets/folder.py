"""Folders of images to records: what is normal, what is defective, which masks belong to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from datasets.mvtec import MaskFolder, canonical_name, report_order
from utils.errors import UserError
from utils.image import SUFFIXES, byte_order, is_image

T = TypeVar("T")
NORMAL, DEFECTIVE, UNKNOWN = 0, 1, -1
GOOD_NAMES = ("good", "ok", "normal")  # folders of normal images, in any case


@dataclass(frozen=True)
class Record:
    """One image file. The label comes from its folder, never from a mask."""

    path: Path
    label: int  # NORMAL, DEFECTIVE or UNKNOWN
    defect: str  # "good", the name of the defect's folder, or "unknown"
    masks: tuple[Path, ...] = ()  # to be united; empty for normal images

    @property
    def has_truth(self) -> bool:
        """Tell whether it is known for every pixel if it is defective."""
        return self.label == NORMAL or bool(self.masks)


@dataclass(frozen=True)
class Category:
    """The images of one product or material."""

    name: str
    root: Path
    layout: str  # "mvtec" (with ground_truth/), "train_test" (without) or "good_only"
    train: tuple[Record, ...]
    test: tuple[Record, ...]


def find_category(root: Path, category: str) -> Category:
    """Read `<root>/<category>`, or `root` itself if it holds train/, test/ or images directly.

    The category may be written as an alias ("metal nut"). A category that is `root` itself
    takes the folder's name. Raise UserError if nothing fits or a stem occurs twice in a folder.
    """
    _require_folder(root)
    folder = _subfolder(root, category)
    if folder is None and (_has_splits(root) or _image_files(root)):
        folder = root
    if folder is None:
        known = ", ".join(_category_folders(root)) or "none"
        raise UserError(
            f"{root}: no category '{category}' (found: {known}); "
            "expected a folder of that name, or train/ and test/, or images in it"
        )
    return _read_category(folder)


def find_categories(root: Path) -> list[str]:
    """List the categories under `root` in table order; `[its name]` if `root` itself is one."""
    _require_folder(root)
    names = _category_folders(root)
    if not names and (_has_splits(root) or _image_files(root)):
        names = [root.resolve().name]
    if not names:
        raise UserError(f"{root}: no categories here; looked for <category>/train/good and train/")
    return names


def split_holdout(
    records: Sequence[T], fraction: float = 0.1, seed: int = 0
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Set aside a random part of normal images for thresholds: (train, holdout), order kept.

    At least one image goes to either side. Raise UserError for fewer than two images.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction} must lie between 0 and 1, both excluded")
    count = len(records)
    if count < 2:
        raise UserError(
            f"{count} training image(s): at least 2 are needed, one to train on and one to set "
            "the threshold; add normal images to train/good"
        )
    held = min(max(round(fraction * count), 1), count - 1)
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist())
    train = tuple(record for i, record in enumerate(records) if i not in chosen)
    return train, tuple(record for i, record in enumerate(records) if i in chosen)


def subfolders(folder: Path) -> list[Path]:
    """List the folders in `folder`, byte-wise, without hidden ones; empty if it does not exist."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(found, key=byte_order)


def is_good_name(name: str) -> bool:
    """Tell whether a folder name means normal images."""
    return name.lower() in GOOD_NAMES


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds the categories")


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _category_folders(root: Path) -> list[str]:
    return report_order(folder.name for folder in subfolders(root) if _has_splits(folder))


def _subfolder(root: Path, category: str) -> Path | None:
    if (root / category).is_dir():
        return root / category
    wanted = canonical_name(category)
    same = (folder for folder in subfolders(root) if canonical_name(folder.name) == wanted)
    return next(same, None)


def _read_category(folder: Path) -> Category:
    name = folder.resolve().name
    if _has_splits(folder):
        layout = "mvtec" if (folder / "ground_truth").is_dir() else "train_test"
        return Category(name, folder, layout, _train_records(folder), _test_records(folder))
    train = _records(folder, NORMAL, "good")
    if not train:
        raise UserError(
            f"{folder}: no data set here; looked for train/good, train/ok, train/normal, test/ "
            f"and for images ({' '.join(SUFFIXES)})"
        )
    return Category(name, folder, "good_only", train, ())


def _train_records(folder: Path) -> tuple[Record, ...]:
    train = folder / "train"
    if not train.is_dir():
        return ()
    good = [sub for sub in subfolders(train) if is_good_name(sub.name)] or [train]
    records = tuple(record for sub in good for record in _records(sub, NORMAL, "good"))
    if not records and good == [train] and subfolders(train):
        raise UserError(f"{train}: none of its folders is called {', '.join(GOOD_NAMES)}")
    return records


def _test_records(folder: Path) -> tuple[Record, ...]:
    test = folder / "test"
    if not test.is_dir():
        return ()
    records = list(_records(test, UNKNOWN, "unknown"))
    for sub in subfolders(test):
        if is_good_name(sub.name):
            records += _records(sub, NORMAL, "good")
        else:
            masks = MaskFolder(folder / "ground_truth" / sub.name)
            records += _records(sub, DEFECTIVE, sub.name, masks)
    return tuple(records)


def _records(
    folder: Path, label: int, defect: str, masks: MaskFolder | None = None
) -> tuple[Record, ...]:
    files = _image_files(folder)
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"{folder}: {other.name} and {file.name} share a stem, by which masks are found; "
                "rename or remove one"
            )
    return tuple(Record(f, label, defect, masks.of(f.stem) if masks else ()) for f in files)


def _image_files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if is_image(path)), key=byte_order)
