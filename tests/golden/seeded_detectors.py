"""Detectors of other projects, drawn from names and shapes: as `seeded_weights`, for flows too."""

import zlib
from collections.abc import Sequence

import numpy as np

from tests.golden import seeded_weights as seeded

# the second copy of CS-Flow's backbone in anomalib's files, and the first
COPIES = ("feature_extractor.feature_extractor.feature_extractor.", "feature_extractor.backbone.")


def draw(key: str, shape: Sequence[int]) -> np.ndarray:
    """Draw one array; permutations are one-hot, and scales near those that change nothing."""
    leaf = key.rpartition(".")[2]
    rng = np.random.default_rng(zlib.crc32(key.removesuffix("_inv").encode()))
    if leaf in ("w_perm", "w_perm_inv"):
        matrix = np.eye(shape[0], dtype=np.float32)[rng.permutation(shape[0])]
        return np.ascontiguousarray(matrix.T if leaf == "w_perm_inv" else matrix).reshape(shape)
    if leaf == "downsample_kernel":
        return np.zeros(shape, np.float32)  # a constant, which no converter reads
    if leaf == "global_scale":
        return 10 + rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 3 and leaf == "weight":  # of a layer norm
        return np.float32(1) + np.float32(0.1) * rng.standard_normal(shape, dtype=np.float32)
    return seeded.draw(key.replace(COPIES[0], "feature_extractor." + COPIES[1]), shape)


def draw_all(shapes: seeded.Shapes) -> dict[str, np.ndarray]:
    """Draw the state dict of a detector."""
    return {key: draw(key, shape) for key, shape in shapes.items()}


def photograph(height: int, width: int) -> np.ndarray:
    """Draw an image (1, 3, height, width) in [0, 1]."""
    return np.random.default_rng(height).random((1, 3, height, width), dtype=np.float32)
