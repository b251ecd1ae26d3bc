"""Pixel scores of a test set: maps and masks checked, background pooled and sorted once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metrics.roc import check_finite
from utils.errors import UserError

NO_DEFECTIVE = "test set has no defective images"
NO_MASK = "no image has a ground-truth mask"

Maps = Sequence[NDArray] | NDArray  # N maps (H, W), sizes may differ
Masks = Sequence[NDArray | None] | NDArray  # N masks (H, W), defective where > 0; None: all normal


def check_maps(
    maps: Maps, masks: Masks, names: Sequence[str] | None = None, kind: str = "anomaly"
) -> None:
    """Raise a UserError naming the image unless maps are finite (H, W) and masks fit them."""
    if len(maps) != len(masks):
        raise UserError(f"{len(maps)} {kind} maps but {len(masks)} masks: give one per map")
    for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
        name = names[index] if names else f"image {index}"
        if anomaly_map.ndim != 2:
            raise UserError(f"{kind} map of {name}: shape {anomaly_map.shape}, must be (H, W)")
        check_finite(anomaly_map, f"{kind} map of {name}")
        if mask is not None and mask.shape != anomaly_map.shape:
            raise UserError(
                f"mask of {name}: shape {mask.shape} but its {kind} map has "
                f"{anomaly_map.shape}; resize masks to the evaluation size (nearest)"
            )


def sorted_background(maps: Maps, masks: Masks) -> NDArray:
    """Return the scores of all pixels outside the masks, ascending (B,): the only full-size copy.

    The maps must have passed `check_maps`.
    """
    size = sum(m.size for m in maps)
    size -= sum(np.count_nonzero(mask > 0) for mask in masks if mask is not None)
    pooled = np.empty(size, dtype=np.result_type(*{m.dtype for m in maps}) if len(maps) else float)
    end = 0
    for anomaly_map, mask in zip(maps, masks, strict=True):
        normal = anomaly_map.reshape(-1) if mask is None else anomaly_map[mask <= 0]
        start, end = end, end + normal.size
        pooled[start:end] = normal
    pooled.sort()
    return pooled
