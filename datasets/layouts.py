"""Layouts of data sets: how the folders of a category are recognised and read."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datasets.records import (
    DEFECTIVE,
    GOOD_NAMES,
    NORMAL,
    UNKNOWN,
    Category,
    MaskFolder,
    Record,
    has_images,
    image_files,
    is_good_name,
    records_of,
    some,
    subfolders,
)
from datasets.visa import has_visa_folders, read_visa
from utils.errors import UserError
from utils.image import SUFFIXES, read_mask_values

TEST_SHARE = 0.2  # of the normal images, where a data set has no split of its own
ITEM_SHARE = 1 / 3  # of KolektorSDD's items; its authors test on each third of them in turn
_LABEL = "_label"  # ends the stems of KolektorSDD's masks
# Folders of a category, never one themselves.
_PARTS = ("train", "test", "validation", "test_public", "ground_truth")


@dataclass(frozen=True)
class Layout:
    """One way to arrange a category: `read` gets its folder and what to call the layout."""

    title: str
    expected: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, str], Category]


def recognise(folder: Path) -> Layout | None:
    """Return the layout that the folders in `folder` show, None if they show none.

    Images alone are not enough: they may be anything.
    """
    return next((layout for layout in LAYOUTS.values() if layout.fits(folder)), None)


def read_category(folder: Path, name: str = "auto") -> Category:
    """Read a category in the layout of that name (`data.layout`), or in the one it shows.

    Raise UserError if its folders do not fit.
    """
    if name == "auto":
        layout = recognise(folder) or LAYOUTS["folder"]
    else:
        layout = LAYOUTS[name]
        if name != "folder" and not layout.fits(folder):
            raise UserError(_misfit(folder, name))
    return layout.read(folder, layout.title)


def chosen_by_name(names: Iterable[str], share: float) -> set[str]:
    """Choose about `share` of the names by their hashes, at least one and never all of several.

    Whether a name's hash, as a number from 0 to 1, lies below `share` does not depend on the other
    names: data that grows later keeps its split.
    """
    ranks = {name: _rank(name) for name in names}
    count = sum(rank < share for rank in ranks.values())
    count = max(0, min(max(count, 1), len(ranks) - 1))
    return set(sorted(ranks, key=lambda name: ranks[name])[:count])


def _rank(name: str) -> float:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def _misfit(folder: Path, name: str) -> str:
    layout, shown = LAYOUTS[name], recognise(folder)
    inside = [
        f"{outer.name}/{inner.name}"
        for outer in subfolders(folder)
        for inner in (subfolders(outer) or [Path()])
    ]
    remedy = f"; data.layout=auto reads it as {shown.title}" if shown else ""
    return (
        f"{folder}: data.layout is {name}, so expected {layout.expected}; found "
        f"{some(inside, 8) or 'no folders'}{remedy}"
    )


def _fits_splits(*signs: str) -> Callable[[Path], bool]:
    return lambda folder: any((folder / sign).is_dir() for sign in signs)


def _fits_plain(folder: Path) -> bool:
    if _has_splits(folder):
        return True
    good = [sub for sub in subfolders(folder) if is_good_name(sub.name)]
    return folder.resolve().name not in _PARTS and any(has_images(sub) for sub in good)


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _read_splits(folder: Path, title: str) -> Category:
    """Read train/ and test/ with masks in ground_truth/: MVTec AD, BTAD, MPDD and their like."""
    train, ignored = _normal_records(folder / "train")
    test = [
        *_loose_records(folder / "test"),
        *_sorted_records(subfolders(folder / "test"), folder / "ground_truth"),
    ]
    return Category(folder.resolve().name, folder, title, train, tuple(test), (), ignored)


def _normal_records(part: Path) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """Return what lies in `part`/good, or directly in `part`, and what is left out there."""
    inside = subfolders(part)
    good = [sub for sub in inside if is_good_name(sub.name)]
    others = [sub.name for sub in inside if sub not in good]
    places = good or ([part] if part.is_dir() else [])
    records = tuple(r for place in places for r in records_of(image_files(place), NORMAL, "good"))
    if not records and not good and others:
        raise UserError(f"{part}: none of its folders is called {', '.join(GOOD_NAMES)}")
    note = f"folders in {part.name}/ that are not used: {', '.join(others)}"
    return records, (note,) if others else ()


def _loose_records(part: Path) -> tuple[Record, ...]:
    """Return the images directly in `part`, of which nothing is known."""
    return records_of(image_files(part), UNKNOWN, "unknown") if part.is_dir() else ()


def _sorted_records(folders: Sequence[Path], masks: Path) -> list[Record]:
    """Return the images in folders of normal images and of kinds of defects."""
    found: list[Record] = []
    for folder in folders:
        if is_good_name(folder.name):
            found += records_of(image_files(folder), NORMAL, "good")
        else:
            masks_of = MaskFolder(masks / folder.name).of
            found += records_of(image_files(folder), DEFECTIVE, folder.name, masks_of)
    return found


def _read_mvtec2(folder: Path, title: str) -> Category:
    """Read MVTec AD 2: validation/good is held out, the private test images are unlabelled."""
    train, ignored = _normal_records(folder / "train")
    holdout, _ = _normal_records(folder / "validation")
    public = folder / "test_public"
    kinds = [sub for sub in subfolders(public) if sub.name != "ground_truth"]
    test = _sorted_records(kinds, public / "ground_truth")
    for name in ("test_private", "test_private_mixed"):
        test += _loose_records(folder / name)
    return Category(folder.resolve().name, folder, title, train, tuple(test), holdout, ignored)


def _read_plain(folder: Path, title: str) -> Category:
    """Read train/ and test/, else good/ beside folders of defects, else nothing but good images.

    Without test/ a part of good/ is for testing, chosen by file name.
    """
    if _has_splits(folder):
        return _read_splits(folder, title)
    name, inside = folder.resolve().name, subfolders(folder)
    kinds = [sub for sub in inside if sub.name != "ground_truth"]
    found = _sorted_records(kinds, folder / "ground_truth")
    normal = [record for record in found if record.label == NORMAL]
    if not normal:
        train = records_of(image_files(folder), NORMAL, "good")
        if not train:
            raise UserError(
                f"{folder}: no data set here; looked for train/good, train/ok, train/normal, "
                f"test/, good/ and for images ({' '.join(SUFFIXES)})"
            )
        return Category(name, folder, f"{title}, images only", train, ())
    defective = [record for record in found if record.label == DEFECTIVE]
    if not defective:
        return Category(name, folder, title, tuple(normal), ())
    return _split_by_name(folder, title, normal, defective)


def _split_by_name(
    folder: Path, title: str, normal: Sequence[Record], defective: Sequence[Record]
) -> Category:
    """Return a category whose normal images are divided by the stems of their names."""
    chosen = chosen_by_name((record.path.stem for record in normal), TEST_SHARE)
    train = tuple(record for record in normal if record.path.stem not in chosen)
    test = (*(record for record in normal if record.path.stem in chosen), *defective)
    return Category(folder.resolve().name, folder, f"{title}, split by file name", train, test)


def _tile_folders(folder: Path) -> dict[str, Path]:
    """Return {"free": MT_Free/Imgs, "crack": MT_Crack/Imgs, …}."""
    named = {s.name[3:].lower(): s for s in subfolders(folder) if s.name.upper().startswith("MT_")}
    return {kind: sub / "Imgs" for kind, sub in named.items() if (sub / "Imgs").is_dir()}


def _read_tiles(folder: Path, title: str) -> Category:
    """Read the magnetic tiles: photographs as JPEG, beside each a PNG of the same stem, its mask.

    There is no published split: a part of MT_Free is for testing, chosen by file name.
    """
    normal: list[Record] = []
    defective: list[Record] = []
    for kind, imgs in _tile_folders(folder).items():
        files = image_files(imgs)
        masks: defaultdict[str, tuple[Path, ...]] = defaultdict(tuple)
        masks |= {file.stem: (file,) for file in files if file.suffix.lower() == ".png"}
        photographs = [file for file in files if file.suffix.lower() != ".png"]
        if kind == "free":
            normal += records_of(photographs, NORMAL, "good")
        else:
            defective += records_of(photographs, DEFECTIVE, kind, masks.__getitem__)
    return _split_by_name(folder, title, normal, defective)


def _item_folders(folder: Path) -> list[Path]:
    return [sub for sub in subfolders(folder) if re.fullmatch(r"kos\d+", sub.name, re.IGNORECASE)]


def _fits_items(folder: Path) -> bool:
    files = (file for item in _item_folders(folder) for file in image_files(item))
    return any(file.stem.endswith(_LABEL) for file in files)


def _read_items(folder: Path, title: str) -> Category:
    """Read KolektorSDD: folders of one item each, kosNN/PartM.jpg and PartM_label.bmp.

    There is no published split by name: a third of the items, chosen by their names, is for
    testing. Parts of one item look alike, so an item is never on both sides: the defective parts
    of the other items, which cannot be trained on, are left out. Raise UserError for a part without
    a label.
    """
    items = {item.name: _labelled_parts(item) for item in _item_folders(folder)}
    testing = chosen_by_name(items, ITEM_SHARE)
    train = [r for item, parts in items.items() if item not in testing for r in parts]
    test = [r for item, parts in items.items() if item in testing for r in parts]
    normal = tuple(record for record in train if record.label == NORMAL)
    unused = len(train) - len(normal)
    note = f"{unused} defective image(s) of items that others are trained on, which look alike"
    return Category(
        folder.resolve().name, folder, f"{title}, split by item", normal, tuple(test), (),
        (note,) if unused else (),
    )  # fmt: skip


def _labelled_parts(item: Path) -> tuple[Record, ...]:
    files = image_files(item)
    labels = {f.stem.removesuffix(_LABEL): f for f in files if f.stem.endswith(_LABEL)}
    parts = [file for file in files if not file.stem.endswith(_LABEL)]
    missing = [part.name for part in parts if part.stem not in labels]
    if missing:
        raise UserError(
            f"{item}: no label of {some(missing)}; expected <name>{_LABEL}.bmp "
            "beside each image, for it says whether the image is defective"
        )
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        marked = list(pool.map(lambda part: read_mask_values(labels[part.stem]).any(), parts))
    normal = [part for part, mark in zip(parts, marked, strict=True) if not mark]
    defective = [part for part, mark in zip(parts, marked, strict=True) if mark]
    return (
        *records_of(normal, NORMAL, "good"),
        *records_of(defective, DEFECTIVE, "defective", lambda stem: (labels[stem],)),
    )


_SPLITS = "train/{0}, test/{0}, test/{1} and ground_truth/{1}"
# In the order in which they are recognised. MPDD cannot be told from MVTec AD.
LAYOUTS = {
    "mvtec2": Layout(
        "MVTec AD 2 layout", "train/good, validation/good and test_public/good, /bad, "
        "/ground_truth/bad", _fits_splits("test_public"), _read_mvtec2,
    ),
    "visa": Layout(
        "VisA layout", "Data/Images/Normal, Data/Images/Anomaly and Data/Masks/Anomaly",
        has_visa_folders, read_visa,
    ),
    "mtd": Layout(
        "MTD layout", "MT_Free/Imgs, MT_Crack/Imgs and so on",
        lambda folder: bool(_tile_folders(folder)), _read_tiles,
    ),
    "kolektor": Layout(
        "KolektorSDD layout", f"kos01/Part0.jpg, kos01/Part0{_LABEL}.bmp and so on", _fits_items,
        _read_items,
    ),
    "btad": Layout(
        "BTAD layout", _SPLITS.format("ok", "ko"),
        _fits_splits("train/ok", "test/ok", "test/ko"), _read_splits,
    ),
    "mvtec": Layout(
        "MVTec AD layout", _SPLITS.format("good", "<defect>"),
        _fits_splits("train/good", "test/good"), _read_splits,
    ),
    "mpdd": Layout(
        "MPDD layout", _SPLITS.format("good", "<defect>"),
        _fits_splits("train/good", "test/good"), _read_splits,
    ),
    "folder": Layout("plain folders", "train/ and test/, or good/, or images", _fits_plain,
                     _read_plain),
}  # fmt: skip
