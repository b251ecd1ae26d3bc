"""Images with what is known of them: records, categories, and the masks that belong to an image."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.image import byte_order, is_image

NORMAL, DEFECTIVE, UNKNOWN = 0, 1, -1
GOOD_NAMES = ("good", "ok", "normal")  # folders of normal images, in any case


@dataclass(frozen=True)
class Record:
    """One image file. The label comes from its place in the data set, never from a resized mask."""

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
    layout: str  # what its folders look like, for people
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    holdout: tuple[Record, ...] = ()  # normal images that the data set itself sets aside
    left_out: tuple[str, ...] = ()  # what lies in its folders but is not used, and why

    def describe(self) -> str:
        """Return one line: the layout, where it was found, how many images there are of what."""
        known = [record for record in self.test if record.label != UNKNOWN]
        defective = sum(record.label == DEFECTIVE for record in known)
        masked = sum(bool(record.masks) for record in known)
        parts = [f"{len(self.train)} train"]
        if self.holdout:
            parts.append(f"{len(self.holdout)} validation")
        parts.append(f"{len(known)} test ({defective} defective)" if known else "no test images")
        if defective:
            parts.append(f"masks for {masked}" if masked else "no masks")
        if len(known) < len(self.test):
            parts.append(f"{len(self.test) - len(known)} unlabelled")
        return f"{self.layout} in {self.root}: {', '.join(parts)}"


class MaskFolder:
    """Find the masks of one defect folder by exact image stem."""

    def __init__(self, folder: Path) -> None:
        entries = sorted(folder.iterdir(), key=byte_order) if folder.is_dir() else []
        self._folders = {entry.name: entry for entry in entries if entry.is_dir()}
        self._files: dict[str, list[Path]] = {}
        for entry in entries:
            if is_image(entry):
                self._files.setdefault(entry.stem, []).append(entry)

    def of(self, stem: str) -> tuple[Path, ...]:
        """Return the mask files of the image called `stem`; several are to be united.

        In this order: `<stem>_mask.png`, `<stem>.png`, `<stem>_mask.<other>`, `<stem>.<other>`,
        every image in the folder `<stem>/` (MVTec LOCO). Empty if there is none.
        """
        named, bare = self._files.get(f"{stem}_mask", []), self._files.get(stem, [])
        files = [file for file in (*named, *bare) if file.suffix.lower() == ".png"]
        files += [*named, *bare]
        if files:
            return (files[0],)
        if stem in self._folders:
            return tuple(image_files(self._folders[stem]))
        return ()


def records_of(
    files: Iterable[Path],
    label: int,
    defect: str,
    masks_of: Callable[[str], tuple[Path, ...]] = lambda stem: (),
) -> tuple[Record, ...]:
    """Return a record per image file of one folder; `UserError` if two of them share a stem."""
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"{file.parent}: {other.name} and {file.name} share a stem, by which masks are "
                "found; rename or remove one"
            )
    return tuple(Record(f, label, defect, masks_of(stem)) for stem, f in by_stem.items())


def image_files(folder: Path) -> list[Path]:
    """List the images directly in a folder, byte-wise, without hidden ones."""
    return sorted((path for path in folder.iterdir() if is_image(path)), key=byte_order)


def has_images(folder: Path) -> bool:
    """Tell whether there is an image directly in a folder."""
    return any(is_image(path) for path in folder.iterdir())


def some(names: Iterable[object], limit: int = 5) -> str:
    """Return the first few names for a message, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def subfolders(folder: Path) -> list[Path]:
    """List the folders in `folder`, byte-wise, without hidden ones; empty if it does not exist."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # knows folders from files without asking for each
        visible = (entry for entry in entries if not entry.name.startswith((".", "__MACOSX")))
        found = [folder / entry.name for entry in visible if entry.is_dir()]
    return sorted(found, key=byte_order)


def is_good_name(name: str) -> bool:
    """Tell whether a folder name means normal images."""
    return name.lower() in GOOD_NAMES
