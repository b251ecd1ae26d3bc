"""Images and masks from files, the one resize of the project, and lists of image files."""

import glob
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from utils.errors import UserError

Size = tuple[int, int]  # (H, W)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Only these decoders run, whatever a file is called: Pillow's others start programs (EPS) or
# are rarely tested.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
TILEWIDTH, TILELENGTH = 322, 323  # tags of a TIFF
_PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # where Pillow finds it


def read_image(path: Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Alpha is dropped. 16-bit grey is scaled by 1/257 over its full range, 16-bit colour keeps its
    high byte. Raise UserError for floating-point, damaged and missing files.
    """
    with _opened(path, path) as image:
        return _to_rgb(_upright(image), path)


class TooManyPixels(UserError):
    """An image is larger than its reader allows."""


def decode_image(data: bytes, name: str, most_pixels: int) -> np.ndarray:
    """Read the content of an image file as `read_image` reads files; `name` is for messages.

    Raise TooManyPixels, before anything is decoded, where the header tells of more than
    `most_pixels`.
    """
    with _opened(io.BytesIO(data), name) as image:
        _check_size(image, name, most_pixels)
        return _to_rgb(_upright(image), name)


def read_mask(path: Path) -> np.ndarray:
    """Read a ground-truth mask as (H, W) bool: True where the pixel is defective.

    Every value above 0 is positive, because masks may hold class indices (VisA: 1, 2, ...). Only
    in a mask that reaches above 127 the cut is there: it is a black-and-white drawing, whose
    values near 0 come from compression or soft edges and would make regions of their own.
    """
    values = read_mask_values(path)
    return values > (127 if values.max() > 127 else 0)


def read_mask_values(path: Path) -> np.ndarray:
    """Read the stored values of a mask as (H, W), unscaled; of colours, the largest channel."""
    with _opened(path, path) as image:
        return _grey_values(_upright(image))


def image_size(path: Path) -> Size:
    """Return (H, W) of an image file as `read_image` would give it."""
    with _opened(path, path) as image:
        width, height = _upright(image).size
    return height, width


def image_mode(path: Path) -> str:
    """Return Pillow's name of the stored pixel format ("RGB", "L", "I;16", ...)."""
    with _opened(path, path) as image:
        return image.mode


_PIL_FILTERS = {"pil": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


def resize(image: np.ndarray, size: Size, method: str = "pil") -> np.ndarray:
    """Resize (H, W, 3) uint8 to `size` = (H, W), ignoring the aspect ratio.

    "pil" is bilinear with antialiasing, "lanczos" with it too (what CFLOW-AD sees), "cv2" bilinear
    without (what FastFlow-Paddle sees).
    """
    height, width = size
    if method in _PIL_FILTERS:
        return np.array(Image.fromarray(image).resize((width, height), _PIL_FILTERS[method]))
    if method == "cv2":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    raise UserError(f"resize method '{method}' is unknown: choose 'pil', 'lanczos' or 'cv2'")


def resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """Resize an (H, W) bool mask to `size` = (H, W) by the nearest pixel centre."""
    height, width = size
    picture = Image.fromarray(mask.astype(np.uint8))
    return np.array(picture.resize((width, height), Image.Resampling.NEAREST)) > 0


def to_input(image: np.ndarray, size: Size, method: str = "pil") -> np.ndarray:
    """Turn (H, W, 3) uint8 into the network's (3, H, W) float32 in [0, 1].

    Mean and standard deviation are subtracted inside the network.
    """
    return to_unit(to_pixels(image, size, method))


def to_pixels(image: np.ndarray, size: Size, method: str = "pil") -> np.ndarray:
    """Resize (H, W, 3) uint8 and bring its channels to the front, (3, H, W) uint8."""
    return np.ascontiguousarray(resize(image, size, method).transpose(2, 0, 1))


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Bring pixels from 0..255 to [0, 1] in float32."""
    return pixels.astype(np.float32) / np.float32(255)


def is_image(path: Path) -> bool:
    """Tell whether `path` is a file, not hidden, with the suffix of an image in any case."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def byte_order(path: Path) -> bytes:
    """Return the key that sorts paths byte by byte, the same under every locale."""
    return os.fsencode(path)


def list_images(source: str | Path) -> list[Path]:
    """List one file, the images in a folder and its sub-folders, or the images of a glob pattern.

    What exists under this very name is taken literally, even with `*`, `?` or `[` in it. Hidden
    files and folders are skipped; the order is byte-wise. Raise UserError if there is none.
    """
    path = Path(source)
    if not str(source):
        raise UserError("no image given: name a file, a folder or a pattern like 'photos/*.png'")
    if path.is_file():
        return [path]
    if path.is_dir():
        base, pattern = path, "**/*"
    else:
        base = next((parent for parent in path.parents if parent.is_dir()), Path())
        pattern = str(path.relative_to(base))
    if not any(character in pattern for character in "*?["):
        raise UserError(f"{source}: no such file or folder")
    # unlike Path.glob, this skips hidden folders and bears patterns like "**.png"
    names = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207
    found = [base / name for name in names if is_image(base / name)]
    if not found:
        raise UserError(f"{source}: no images here; looked for {' '.join(SUFFIXES)}")
    return sorted(found, key=byte_order)


@contextmanager
def _opened(source: Path | io.BytesIO, name: object) -> Iterator[Image.Image]:
    """Yield an image whose pixels are not read yet; any failure to decode becomes a UserError."""
    try:
        with Image.open(source, formats=_FORMATS) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"{name}: cannot read this image: {_reason(error)}") from error
    except Exception as error:  # decoders raise nearly everything on damaged files
        raise UserError(f"{name}: cannot read this image: {_reason(error)}") from error


def _check_size(image: Image.Image, name: str, most: int) -> None:
    """Raise TooManyPixels if the picture, or one tile as a TIFF may describe it, is too large."""
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        sides = (image.tag_v2.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH))
        pixels = max(pixels, math.prod(side for side in sides if isinstance(side, int)))
    if pixels > most:
        raise TooManyPixels(
            f"{name}: {image.width}×{image.height}, {pixels / 1e6:.4g} million pixels; at most "
            f"{most / 1e6:.4g} million are accepted, so scale it down"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, without decoding where there is none.

    In PNG only what stands before the pixels counts; looking behind them would mean decoding.
    """
    if image.format != "PNG" or not _PNG_EXIF.isdisjoint(image.info):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(_FORMATS)}; replace or remove the file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image, name: object) -> np.ndarray:
    if image.mode == "F":
        raise UserError(
            f"{name}: floating-point pixels have no defined white; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        grey = _from_16_bit(np.asarray(image), name)
        return np.repeat(grey[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # dropped like any alpha; Pillow would warn about it
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bit(values: np.ndarray, name: object) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: pixel values outside 0..65535; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounds value / 257


def _grey_values(image: Image.Image) -> np.ndarray:
    if image.mode in ("L", "F") or image.mode.startswith("I"):
        return np.array(image)
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB")).max(axis=2)
