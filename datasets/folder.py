"""Where the categories are: below the folder that a user names, or one wrapper further down."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TypeVar

import numpy as np

from datasets.layouts import read_category, recognise
from datasets.records import Category, has_images, subfolders
from utils.errors import UserError
from utils.image import byte_order
from utils.names import canonical_name, report_order

T = TypeVar("T")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")


def find_category(root: Path, category: str, layout: str = "auto") -> Category:
    """Read `<root>/<category>`, or `root` itself if it is a category.

    The category may be written as an alias ("metal nut"); it may also be in an AI Studio data set
    (`<root>/data<number>`), and in the only folder of either. A category that is `root` itself
    takes the folder's name. Raise UserError if nothing fits, if it is there twice, or if its
    folders are not arranged as `layout` (`data.layout`) has it.
    """
    _require_folder(root)
    named = [folder for place in _places(root) for folder in _named(place, category)]
    distinct = {_unwrapped(folder).resolve(): folder for folder in reversed(named)}  # links are one
    found = [f for f in distinct.values() if _may_be_read(_unwrapped(f))][::-1] or named[:1]
    if len(found) > 1:
        raise UserError(
            f"{root}: '{category}' is in {len(found)} places: {', '.join(map(str, found))}; "
            "give the folder above one of them as --data"
        )
    if found:
        name = found[0].resolve().name
        return replace(read_category(_unwrapped(found[0]), layout), name=name)
    known = _names(root, layout)
    if not known and _may_be_read(root):
        return read_category(root, layout)
    if not known:
        _explain_archives(root, layout)
    raise UserError(
        f"{root}: no category '{category}' (found: {', '.join(known) or 'none'}); "
        "expected a folder of that name, or train/ and test/, or images in it"
    )


def find_categories(root: Path, layout: str = "auto") -> list[str]:
    """List the categories under `root` in table order; `[its name]` if `root` itself is one.

    Folders of nothing but images count as categories if `layout` is "folder".
    """
    _require_folder(root)
    names = _names(root, layout)
    if not names and _may_be_read(root):
        names = [root.resolve().name]
    if not names:
        _explain_archives(root, layout)
        raise UserError(
            f"{root}: no categories here; looked for <category>/train/good and train/, and for the "
            "layouts of data.layout (folder: also for folders of nothing but images)"
        )
    return names


def is_category(root: Path) -> bool:
    """Tell whether `root` is itself the folder of a category, in whatever layout."""
    return root.is_dir() and not _names(root, "auto") and _may_be_read(root)


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


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds the categories")


def _may_be_read(folder: Path) -> bool:
    return recognise(folder) is not None or has_images(folder)


def _places(root: Path) -> list[Path]:
    """Return the folders whose folders may be categories: `root`, AI Studio's, what these wrap."""
    attached = [f for f in subfolders(root) if re.fullmatch(r"data\d+", f.name)]
    places = [root, *(folder for folder in attached if not _may_be_read(folder))]
    inside = [_unwrapped(folder) for folder in places]
    return list(dict.fromkeys([*places, *(f for f in inside if not _may_be_read(f))]))


def _unwrapped(folder: Path) -> Path:
    """Return the one folder in `folder` if there is nothing else to read there."""
    inside = subfolders(folder)
    return inside[0] if len(inside) == 1 and not _may_be_read(folder) else folder


def _named(place: Path, category: str) -> list[Path]:
    if (place / category).is_dir():
        return [place / category]
    wanted = canonical_name(category)
    return [folder for folder in subfolders(place) if canonical_name(folder.name) == wanted]


def _names(root: Path, layout: str) -> list[str]:
    folders = [folder for place in _places(root) for folder in subfolders(place)]
    names = [folder.name for folder in folders if recognise(_same_inside(folder))]
    if not names and layout == "folder" and not _may_be_read(root):
        names = [folder.name for folder in folders if has_images(folder)]
    return report_order(dict.fromkeys(names))


def _same_inside(folder: Path) -> Path:
    """Return <name>/<name>, as unpacking an archive in a folder of its own makes it."""
    inside = _unwrapped(folder)
    return inside if canonical_name(inside.name) == canonical_name(folder.name) else folder


def _explain_archives(root: Path, layout: str) -> None:
    """Raise UserError if what should hold categories holds an archive."""
    files = (path for place in _places(root) for path in sorted(place.iterdir(), key=byte_order))
    visible = (path for path in files if path.is_file() and not path.name.startswith("."))
    archive = next((path for path in visible if path.name.lower().endswith(_ARCHIVES)), None)
    if archive:
        name = "mvtec" if layout in ("auto", "folder") else layout
        raise UserError(
            f"{archive}: is an archive; unpack it with python -m datasets.download {name} "
            f"--archive {quote(str(archive))} --to {quote(str(root))}"
        )
