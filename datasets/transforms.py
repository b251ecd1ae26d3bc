"""Records to pixels and ground-truth masks."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.records import Record
from utils.errors import UserError
from utils.image import Size, image_size, read_image, read_mask, resize_mask, to_pixels


def load_pixels(
    records: Sequence[Record], size: Size, method: str = "pil", workers: int = 1
) -> np.ndarray:
    """Read the images of all records into one (B, 3, H, W) uint8 batch, in `workers` threads."""
    batch = np.empty((len(records), 3, *size), np.uint8)

    def fill(index: int) -> None:
        batch[index] = to_pixels(read_image(records[index].path), size, method)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        list(pool.map(fill, range(len(records))))
    return batch


def load_mask(record: Record, size: Size | None = None) -> np.ndarray:
    """Return which pixels are defective, (H, W) bool: the union of the record's masks.

    `size` None means the size of the image; masks of another size are resized by nearest pixel.
    Raise UserError where the truth is not known (`record.has_truth`).
    """
    return _load_mask(record, size)[0]


def load_masks(
    records: Sequence[Record], size: Size | None = None, workers: int = 1
) -> tuple[list[np.ndarray], int]:
    """Load the masks of all records; count those whose file has another size than its image.

    The count is for one warning by the caller.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        loaded = list(pool.map(lambda record: _load_mask(record, size), records))
    return [mask for mask, _ in loaded], sum(differs for _, differs in loaded)


def _load_mask(record: Record, size: Size | None) -> tuple[np.ndarray, bool]:
    if not record.has_truth:
        raise UserError(
            f"{record.path}: no mask; expected ground_truth/{record.defect}/"
            f"{record.path.stem}_mask.png (without masks only image metrics can be computed)"
        )
    if not record.masks and size is not None:
        return np.zeros(size, bool), False
    image = image_size(record.path)
    united, differs = np.zeros(size or image, bool), False
    for file in record.masks:
        mask = read_mask(file)
        differs |= mask.shape != image
        united |= resize_mask(mask, united.shape)
    return united, differs
