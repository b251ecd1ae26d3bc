"""Large images by tiles: windows at native resolution, their maps blended without seams.

Needs no Paddle. Every window is treated as an image of its own: resized to the network's input,
scored, its map brought back to its place. The blend equals the map of the whole image wherever a
detector looks no further than the dead margin of a window and does not depend on the position;
normalisation over a whole map (FastFlow's LayerNorm), position codes (CFLOW-AD), attention and
strides that do not divide the step of the windows make real detectors differ from that.

Shapes: H W of the image, h w of the network's input.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metrics.acontrario import AContrario
from metrics.threshold import Threshold
from utils.errors import UserError
from utils.image import Size, to_input
from utils.predictions import Found, Network, Original, PhotoReader
from utils.visualize import resize_map

SMALLEST_TILE = 32
OVERLAP = 0.25
MOST_OVERLAP = 0.9
# Pillow refuses twice this many pixels. Its own limit guards against small files that unpack to
# gigabytes; who cuts images into tiles has large ones.
LARGE = 2**30


class Cut(NamedTuple):
    """Hold where a window lies along one axis, where it counts, and its weights there."""

    window: slice  # of the image
    inner: slice  # of the window
    weights: NDArray[np.float32]  # of inner, above 0


@dataclass(frozen=True)
class Tiling:
    """Say how images are cut: `tile` (height, width) in pixels, `overlap` as a share of it."""

    tile: Size
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if min(self.tile) < SMALLEST_TILE:
            raise UserError(
                f"--tile {self}: too small; give at least {SMALLEST_TILE} pixels, best the size "
                "of the images the run was trained on"
            )
        if not 0 <= self.overlap < MOST_OVERLAP:
            raise UserError(
                f"--overlap {self.overlap:g}: must be a share of the tile from 0 to less than "
                f"{MOST_OVERLAP}, for example {OVERLAP}"
            )

    def __str__(self) -> str:
        height, width = self.tile
        return f"{height}x{width}"

    def windows(self, size: Size) -> list[tuple[Cut, Cut]]:
        """Return (rows, columns) of every window of an image of `size` = (H, W), row by row."""
        rows, columns = (cuts(size[i], self.tile[i], self.overlap) for i in (0, 1))
        return list(product(rows, columns))

    def caution(self, threshold: Threshold) -> str:
        """Return one line on what the threshold of images means where their tiles are scored."""
        if threshold.policy == "nfa":
            rule = "the NFA of an image counts all of its tiles"
        else:
            rule = (
                "the highest score of its tiles is that of an image, so the false-alarm rate of "
                "the threshold applies per tile (n tiles, up to n times as many false alarms)"
            )
        return (
            f"warning: tiles of {self}, overlap {self.overlap:g}: {rule}; this needs a run trained "
            "on images like the tiles"
        )


def chosen_tiling(tile: str | None, overlap: float | None) -> Tiling | None:
    """Read --tile ("512", or "384x512" for height x width) and --overlap; None without both."""
    if tile is None:
        if overlap is not None:
            raise UserError(f"--overlap {overlap:g}: has no effect without --tile; give both")
        return None
    sides = re.fullmatch(r"(\d+)(?:[xX](\d+))?", tile.strip(), re.ASCII)
    if sides is None:
        raise UserError(
            f"--tile {tile!r}: must be whole pixels, 512 for squares or 384x512 for height x width"
        )
    height, width = int(sides[1]), int(sides[2] or sides[1])
    return Tiling((height, width), OVERLAP if overlap is None else overlap)


def cuts(length: int, tile: int, overlap: float) -> list[Cut]:
    """Cut an axis into windows of `tile` pixels; the last is shifted inwards, so all are whole.

    The weights at a pixel sum to 1. From one window to the next they change on a ramp in the middle
    of the overlap, half of `overlap` wide; the quarter nearest to either border, which padding
    reaches first, counts for nothing. At the ends of the axis there is no such margin. An axis not
    longer than a tile is one window.
    """
    if length <= tile:
        return [Cut(slice(0, length), slice(0, length), np.ones(length, np.float32))]
    step = max(1, round(tile * (1 - overlap)))
    starts = [*range(0, length - tile, step), length - tile]
    ramp = (tile - step) / 2
    # Ramps of one width with rising centres: differences of neighbours are never negative.
    centres = [-math.inf, *((a + b + tile) / 2 for a, b in pairwise(starts)), math.inf]
    found = []
    for start, (low, high) in zip(starts, pairwise(centres), strict=True):
        middle = start + np.arange(tile) + 0.5  # of every pixel
        weights = _rise(middle - low, ramp) - _rise(middle - high, ramp)
        counting = np.flatnonzero(weights)
        inner = slice(int(counting[0]), int(counting[-1]) + 1)
        found.append(Cut(slice(start, start + tile), inner, weights[inner].astype(np.float32)))
    return found


class Tiler:
    """Judge images window by window, resized as the `reader` does it.

    Never more than `batch_size` windows exist at a time, beside the image and its blended maps.
    With an `acontrario` test there is a map of its results too.
    """

    def __init__(
        self,
        network: Network,
        reader: PhotoReader,
        tiling: Tiling,
        batch_size: int,
        acontrario: AContrario | None = None,
    ) -> None:
        self.network, self.reader = network, reader
        self.tiling, self.batch_size = tiling, batch_size
        self.acontrario = acontrario

    def images(self, paths: Sequence[Path]) -> Iterator[tuple[Original, Found]]:
        """Yield readable images, also large ones, one by one with what their windows say."""
        with large_images():  # until the caller has done, who may read masks of that size
            for each in self.reader.originals(paths):
                yield each, self.judge(each.pixels)

    def judge(self, pixels: NDArray[np.uint8]) -> Found:
        """Return the blended maps of an image (H, W, 3) and what its worst window says.

        NFA is an expected number of false detections, so n windows have n times that of one.
        """
        size = (pixels.shape[0], pixels.shape[1])
        blended = np.zeros(size, np.float32)
        nfa_map = None if self.acontrario is None else np.zeros(size, np.float32)
        windows = self.tiling.windows(size)
        highest: list[float] = []
        peaks: list[float] = []
        nll: list[np.ndarray] = []
        for first in range(0, len(windows), self.batch_size):
            part = windows[first : first + self.batch_size]
            output = self.network(np.stack([self._input(pixels, w) for w in part]))
            highest.append(np.max(output.scores))
            nll += [] if output.nll is None else [output.nll]
            for place, window in enumerate(part):
                _blend(blended, window, output.maps[place])
                if nfa_map is not None and self.acontrario is not None:
                    of_window = self.acontrario.score(output.of(place).evidence)
                    _blend(nfa_map, window, of_window)
                    peaks.append(of_window.max())
        nfa = None
        if nfa_map is not None:
            less = math.log10(len(windows))
            nfa_map -= np.float32(less)
            nfa = nfa_map, float(np.max(peaks)) - less
        about = {"tile": [*self.tiling.tile], "overlap": self.tiling.overlap, "tiles": len(windows)}
        score = float(np.max(highest))  # unlike max(), it passes NaN on
        mean_nll = float(np.concatenate(nll).mean()) if nll else None
        return Found(blended, score, nfa=nfa, about=about, nll=mean_nll)

    def _input(self, pixels: NDArray[np.uint8], window: tuple[Cut, Cut]) -> NDArray[np.float32]:
        rows, columns = window
        seen = pixels[rows.window, columns.window]
        return to_input(seen, self.reader.size, self.reader.method)


@contextmanager
def large_images() -> Iterator[None]:
    """Let Pillow open images of up to 2·`LARGE` pixels inside."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if before is None else max(before, LARGE)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _rise(distance: NDArray[np.float64], ramp: float) -> NDArray[np.float64]:
    """Return 0 left of a ramp, 1 right of it, from the distances to its centre."""
    if ramp == 0:
        return (distance >= 0).astype(np.float64)
    return np.clip(distance / ramp + 0.5, 0.0, 1.0)


def _blend(whole: NDArray[np.float32], window: tuple[Cut, Cut], values: NDArray) -> None:
    """Add the weighted map (h, w) of a window to the map (H, W) of the image."""
    rows, columns = window
    full = resize_map(values, (_length(rows.window), _length(columns.window)))
    weights = rows.weights[:, None] * columns.weights
    target = whole[rows.window, columns.window][rows.inner, columns.inner]
    target += full[rows.inner, columns.inner] * weights


def _length(part: slice) -> int:
    return int(part.stop - part.start)
