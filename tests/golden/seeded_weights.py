"""Weights drawn from their names alone, so that a list of names and shapes stands for a file."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

Shapes = Mapping[str, Sequence[int]]
COUNTERS = "num_batches_tracked"
SAMPLES = 256  # values kept of a feature map


def draw(key: str, shape: Sequence[int]) -> np.ndarray:
    """Draw one array, in float32; features stay near 1 through any depth.

    Statistics and scales of norms are far from those of a fresh network.
    """
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith(COUNTERS):
        return np.array(7, np.int64)
    if key.endswith(("running_var", "_variance")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 4:
        return noise * np.float32(np.sqrt(1 / np.prod(shape[1:])))
    if len(shape) == 2:
        return noise * np.float32(np.sqrt(1 / shape[1]))
    if "gamma" in key:
        return np.float32(0.1) + noise * np.float32(0.02)
    if len(shape) == 1 and key.endswith("weight"):
        return np.float32(1) + noise * np.float32(0.1)
    return noise * np.float32(0.2)


def draw_all(shapes: Shapes) -> dict[str, np.ndarray]:
    """Draw the content of a file."""
    return {key: draw(key, shape) for key, shape in shapes.items()}


def image(size: int) -> np.ndarray:
    """Draw a normalised image (1, 3, size, size)."""
    return np.random.default_rng(size).standard_normal((1, 3, size, size), dtype=np.float32)


def sample(feature: np.ndarray) -> np.ndarray:
    """Pick values all over a feature map, the same at every call."""
    return np.random.default_rng(feature.size).choice(feature.reshape(-1), SAMPLES)


def to_text(shapes: Shapes) -> str:
    """Write a line `name sizes` for every array."""
    return "\n".join(" ".join([key, *map(str, shape)]) for key, shape in shapes.items())


def from_text(text: str) -> dict[str, tuple[int, ...]]:
    """Read what `to_text` writes."""
    rows = [line.split() for line in text.splitlines()]
    return {key: tuple(map(int, sizes)) for key, *sizes in rows}
