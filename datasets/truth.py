"""What is known of single images that lie in the folders of a data set."""

from pathlib import Path

import numpy as np

from datasets.layouts import read_category, recognise
from datasets.records import UNKNOWN, Record
from datasets.transforms import load_mask
from utils.errors import UserError

_DEEPEST = 4  # folders between a category and its images, that one included (VisA)
_SIGNS = ("train", "test", "ground_truth")  # of a data set; plain folders may be anything else


class KnownTruth:
    """Labels and masks of images in folders of any known layout; every category is read once."""

    def __init__(self) -> None:
        self._categories: dict[Path, dict[Path, Record]] = {}

    def of(self, image: Path) -> tuple[int | None, np.ndarray | None]:
        """Return the label, 0 or 1, and the mask (H, W) bool; None for what is not known.

        The mask of a normal image is None too.
        """
        record = self._record(image.parent.resolve() / image.name)
        if record is None or record.label == UNKNOWN:
            return None, None
        return record.label, load_mask(record) if record.masks else None

    def _record(self, image: Path) -> Record | None:
        for folder in reversed(image.parents[:_DEEPEST]):  # Data/Images/ looks like plain folders
            if folder not in self._categories:
                self._categories[folder] = _records(folder)
            if image in self._categories[folder]:
                return self._categories[folder][image]
        return None


def _records(folder: Path) -> dict[Path, Record]:
    """Return the images of a category by path; none if `folder` is not one or cannot be read."""
    layout = recognise(folder)
    plain = layout is not None and layout.title == "plain folders"
    if layout is None or (plain and not any((folder / sign).is_dir() for sign in _SIGNS)):
        return {}
    try:
        category = read_category(folder)
    except UserError:
        return {}
    return {r.path: r for r in (*category.train, *category.holdout, *category.test)}
