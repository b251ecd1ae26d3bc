"""The worked example of the metric definitions."""

import numpy as np
import pytest


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray]:
    """Return maps (2, 4, 4) in fifteenths and masks: one defective image, one normal."""
    maps = [
        [[9, 1, 2, 3], [4, 12, 13, 5], [6, 7, 14, 8], [0, 11, 10, 15]],
        [[5, 6, 1, 0], [2, 9, 8, 3], [4, 7, 10, 11], [12, 13, 14, 15]],
    ]
    masks = np.zeros((2, 4, 4), dtype=np.uint8)
    masks[0] = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]
    return np.array(maps) / 15, masks
