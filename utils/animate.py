"""Pictures of predictions as one moving picture. Needs no Paddle."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from utils.files import atomic_replace
from utils.image import Size, image_size, read_image
from utils.visualize import PAPER

T = TypeVar("T")

MOST_FRAMES = 40
FRAME_TIME = 1000  # milliseconds


def write_gif(path: Path, pictures: Sequence[Path], most: int = MOST_FRAMES) -> int:
    """Write picture files as an endless GIF, each shown for a second; return how many are in it.

    Of more than `most`, evenly spread ones are taken. All frames have the largest width and height;
    smaller pictures lie top left, so that what they share stays in place. Raise UserError for a
    picture that cannot be read.
    """
    chosen = spread(pictures, most)
    sizes = [image_size(picture) for picture in chosen]
    frame = max(height for height, _ in sizes), max(width for _, width in sizes)
    frames = _frames(chosen, frame)
    with atomic_replace(path) as temporary:
        next(frames).save(
            temporary, format="GIF", save_all=True, append_images=frames,
            duration=FRAME_TIME, loop=0, optimize=False,
        )  # fmt: skip
    return len(chosen)


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return up to `most` items in their order, evenly spread, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _frames(pictures: Sequence[Path], size: Size) -> Iterator[Image.Image]:
    """Yield frames of `size` = (H, W) with a palette each, so that few bytes wait for the rest."""
    height, width = size
    for picture in pictures:
        pixels = Image.fromarray(read_image(picture))
        frame = Image.new("RGB", (width, height), PAPER)
        frame.paste(pixels, (0, 0))
        # Maximum coverage keeps the colours of thin outlines; median cut averages them away.
        yield frame.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
