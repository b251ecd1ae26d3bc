"""MVTec AD: category names and their order in tables, and how masks belong to images."""

from collections.abc import Iterable
from pathlib import Path

from utils.image import byte_order, is_image

TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    "bottle",
    "cable",
    "capsule",
    "hazelnut",
    "metal_nut",
    "pill",
    "screw",
    "toothbrush",
    "transistor",
    "zipper",
)
CATEGORIES = TEXTURES + OBJECTS


def canonical_name(name: str) -> str:
    """Return a category name in the data set's spelling: "Metal Nut" -> "metal_nut"."""
    return "_".join(name.replace("-", " ").replace("_", " ").lower().split())


def report_order(names: Iterable[str]) -> list[str]:
    """Sort category names: those of MVTec AD first, in the order of its tables, others by name."""
    rank = {name: i for i, name in enumerate(CATEGORIES)}
    return sorted(names, key=lambda name: (rank.get(canonical_name(name), len(rank)), name))


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
            inside = filter(is_image, self._folders[stem].iterdir())
            return tuple(sorted(inside, key=byte_order))
        return ()
