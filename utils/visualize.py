"""Pictures of predictions in the geometry of the original image. Needs no Paddle."""

import hashlib
import importlib.util
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError
from utils.files import atomic_write_bytes
from utils.image import SUFFIXES, Size, resize

# Shapes: H W of the original image, T the side of one tile. Pictures are RGB uint8.
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Blue against yellow is told apart with every common kind of colour blindness; the black line
# outside keeps both visible on white and on the bright end of the heat map.
PREDICTED: Colour = (0, 229, 255)
TRUTH: Colour = (255, 221, 0)
PAPER, INK = (250, 250, 250), (20, 20, 20)
PAD, LINE, BAR = 8, 20, 72  # pixels: margin, line of text, column of the colour bar
TEXT_SIZE = 14
WIDEST_NAME = 120  # bytes; leaves room for suffixes within the 255 a file system allows
# Asked by name only for text that DejaVu Sans cannot write; usual on Linux, Windows and macOS.
FURTHER_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "PingFang.ttc",
)


class Region(TypedDict):
    """Describe one connected region above the threshold, in pixels of the original image."""

    x: int
    y: int
    w: int
    h: int
    area: int
    peak: float


class _Tile(NamedTuple):
    label: str
    picture: Picture
    outline: Colour | None = None


def resize_map(anomaly_map: NDArray, size: Size) -> NDArray:
    """Resize a map (h, w) bilinearly to `size` = (H, W) of the original image, as floats."""
    values = np.ascontiguousarray(anomaly_map, np.float32)
    height, width = size
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)


def regions(anomaly_map: NDArray, defective: NDArray[np.bool_]) -> list[Region]:
    """List the 8-connected regions of a mask (H, W) in a map, the highest peak first."""
    rows, columns = (np.flatnonzero(defective.any(axis)) for axis in (1, 0))
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])  # only the part that holds them, for speed
    part = slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1)
    inside = defective[part]
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
    values = anomaly_map[part][inside]
    peaks = np.full(count, -np.inf, values.dtype)  # of one type with them, or it takes ten times
    np.maximum.at(peaks, labels[inside].astype(np.intp), values)
    found = [
        Region(
            x=int(x) + left, y=int(y) + top, w=int(w), h=int(h), area=int(area), peak=float(peak)
        )
        for (x, y, w, h, area), peak in zip(boxes[1:], peaks[1:], strict=True)
    ]
    return sorted(found, key=lambda region: -region["peak"])


def heat_map(anomaly_map: NDArray, low: float, high: float) -> Picture:
    """Colour a map (H, W) on the fixed scale `low` to `high`: one value, one colour everywhere."""
    if not low < high:
        raise UserError(f"colour scale {low} to {high}: must rise; give a larger upper end")
    values = np.asarray(anomaly_map, np.float64)
    if not np.isfinite(values).all():
        raise UserError("anomaly map: holds NaN or infinity; the model did not train properly")
    index = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    return _colours()[index.astype(np.uint8)]


def overlay(
    image: Picture, anomaly_map: NDArray, low: float, high: float, alpha: float = 0.5
) -> Picture:
    """Lay the heat map over an image (H, W, 3); `alpha` is its opacity in 0..1."""
    colours = heat_map(resize_map(anomaly_map, image.shape[:2]), low, high)
    mixed = image * (1 - alpha) + colours * alpha
    return np.rint(mixed).astype(np.uint8)


def contours(image: Picture, mask: NDArray[np.bool_], colour: Colour, width: int = 1) -> Picture:
    """Draw the outermost `width` pixels of each region of a mask (H, W), black just outside."""
    inside = mask.astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    # Beyond the picture counts as outside: a region at the border is outlined there as well.
    core = cv2.erode(inside, cross, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    around = cv2.dilate(inside, cross)
    drawn = image.copy()
    drawn[(around > 0) & (inside == 0)] = 0
    drawn[(inside > 0) & (core == 0)] = colour
    return drawn


def marked(
    image: Picture,
    anomaly_map: NDArray,
    predicted: NDArray[np.bool_],
    low: float,
    high: float,
    ground_truth: NDArray[np.bool_] | None = None,
) -> Picture:
    """Lay the heat map over an image (H, W, 3), same geometry, with the outlines of its regions.

    anomaly_map (h, w) of any size; predicted (H, W), outlined; ground_truth (H, W), outlined too
    if it is known.
    """
    width = max(1, round(max(image.shape) / 256))
    picture = overlay(image, anomaly_map, low, high)
    if ground_truth is not None:
        picture = contours(picture, ground_truth, TRUTH, width)
    return contours(picture, predicted, PREDICTED, width)


def panel(
    image: Picture,
    anomaly_map: NDArray,
    predicted: NDArray[np.bool_],
    low: float,
    high: float,
    title: str = "",
    ground_truth: NDArray[np.bool_] | None = None,
    tile: int = 256,
    level: float | None = None,
) -> Picture:
    """Compose image | heat map with the predicted outline | ground truth if known, and a caption.

    image (H, W, 3); anomaly_map (h, w) of any size; predicted, ground_truth (H, W); `title` may
    have several lines. Each tile is `tile` pixels square, whatever the shape of the image. `level`
    is marked on the colour bar.
    """
    small = resize(image, fitted(image.shape[:2], tile))
    heat = outlined(overlay(small, anomaly_map, low, high), predicted, PREDICTED)
    tiles = [_Tile("image", small), _Tile("anomaly map, predicted", heat, PREDICTED)]
    if ground_truth is not None:
        tiles.append(_Tile("ground truth", outlined(small, ground_truth, TRUTH), TRUTH))
    lines = title.splitlines()
    top = PAD + LINE * len(lines)
    canvas_size = (PAD + len(tiles) * (tile + PAD) + BAR, top + tile + LINE + PAD)
    canvas = Image.new("RGB", canvas_size, PAPER)
    for row, line in enumerate(lines):
        _write(canvas, (PAD, PAD // 2 + row * LINE), line, canvas.width - 2 * PAD)
    for column, content in enumerate(tiles):
        _place(canvas, content, (PAD + column * (tile + PAD), top), tile)
    _colour_bar(canvas, (canvas.width - BAR, top), tile, (low, high), level)
    return np.asarray(canvas)


def save_picture(path: Path, rgb: Picture) -> None:
    """Write an RGB picture atomically in the format of the suffix; any Unicode path will do."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: cannot write this format; use one of {' '.join(SUFFIXES)}")
    _, data = cv2.imencode(path.suffix.lower(), np.ascontiguousarray(rgb[..., ::-1]))
    atomic_write_bytes(path, data.tobytes())


def safe_name(text: str) -> str:
    """Return `text` as a file name that every system accepts; distinct texts stay distinct.

    A text that had to be changed gets eight digits of its hash appended.
    """
    name = unicodedata.normalize("NFC", text)
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]', "_", name).strip(" .")
    name = name.encode("utf-8")[:WIDEST_NAME].decode("utf-8", "ignore").rstrip(" .")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):  # devices on Windows
        name = f"_{name}"
    if name == text and name:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name}-{digest[:8]}" if name else f"unnamed-{digest[:8]}"


@lru_cache(maxsize=1)
def _colours() -> Picture:
    """Return the 256 colours of inferno, (256, 3); its lightness rises evenly."""
    ramp = np.arange(256, dtype=np.uint8)[:, None]
    return np.ascontiguousarray(cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO)[:, 0, ::-1])


def fitted(size: Size, tile: int) -> Size:
    """Return the size (H, W) of a picture whose longest side is `tile` pixels."""
    longest = max(size)
    return max(1, round(size[0] * tile / longest)), max(1, round(size[1] * tile / longest))


def outlined(picture: Picture, mask: NDArray[np.bool_], colour: Colour) -> Picture:
    """Draw the outline of a mask (H, W) of the original; its smallest region stays visible."""
    height, width = picture.shape[:2]
    method = cv2.INTER_AREA if height < mask.shape[0] else cv2.INTER_NEAREST
    fitted = cv2.resize(mask.astype(np.float32), (width, height), interpolation=method) > 0
    return contours(picture, fitted, colour, width=2)


def _place(canvas: Image.Image, tile: _Tile, corner: tuple[int, int], side: int) -> None:
    """Put a picture in the middle of its tile and its label below, with a swatch of its colour."""
    height, width = tile.picture.shape[:2]
    left, base = corner[0], corner[1] + side
    centred = (left + (side - width) // 2, corner[1] + (side - height) // 2)
    canvas.paste(Image.fromarray(tile.picture), centred)
    indent = 0
    if tile.outline is not None:
        swatch = (left, base + 6, left + 10, base + 16)
        ImageDraw.Draw(canvas).rectangle(swatch, fill=tile.outline, outline=INK)
        indent = 16
    _write(canvas, (left + indent, base + 1), tile.label, side - indent)


def _colour_bar(
    canvas: Image.Image,
    corner: tuple[int, int],
    height: int,
    scale: tuple[float, float],
    threshold: float | None,
) -> None:
    """Draw the scale with numbers at its ends and at the threshold, where that is on it."""
    left, top = corner
    low, high = scale
    bar = np.repeat(_colours()[np.linspace(255, 0, height).round().astype(int), None], 14, axis=1)
    canvas.paste(Image.fromarray(bar), (left, top))
    end = top + height - LINE
    _write(canvas, (left + 20, top), f"{high:.3g}", BAR - 22)
    _write(canvas, (left + 20, end), f"{low:.3g}", BAR - 22)
    if threshold is None or not low <= threshold <= high:
        return
    level = top + round((high - threshold) / (high - low) * (height - 1))
    ImageDraw.Draw(canvas).line((left - 2, level, left + 17, level), fill=PREDICTED, width=2)
    if top + 1.5 * LINE <= level <= end - 0.5 * LINE:  # its number does not cover those at the ends
        _write(canvas, (left + 20, level - LINE // 2), f"{threshold:.3g}", BAR - 22)


def _write(canvas: Image.Image, corner: tuple[int, int], text: str, width: int) -> None:
    """Write one line, its middle left out where it is longer than `width` pixels."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    font = _font_for(text)
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    ImageDraw.Draw(canvas).text(corner, shown, fill=INK, font=font)


def _font_for(text: str) -> Font:
    strange = sorted({c for c in text if not c.isascii()})
    first = _font("")
    if all(_has(first, c) for c in strange):
        return first
    others = (_font(name) for name in FURTHER_FONTS)
    return next((f for f in others if all(_has(f, c) for c in strange)), first)


def _has(font: Font, character: str) -> bool:
    absent = font.getmask("\U0010ffff")
    glyph = font.getmask(character)
    return glyph.size != absent.size or bytes(glyph) != bytes(absent)


@lru_cache(maxsize=16)
def _font(name: str) -> Font:
    """Return a font of the system by file name; "" or an absent one gives one that is always here.

    That is DejaVu Sans from Matplotlib, or else the one inside Pillow.
    """
    package = importlib.util.find_spec("matplotlib")  # found, not imported: importing is slow
    shipped = "mpl-data/fonts/ttf/DejaVuSans.ttf"
    beside = [Path(package.origin).parent / shipped] if package and package.origin else []
    for candidate in [name] if name else beside:
        try:
            return ImageFont.truetype(str(candidate), TEXT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(TEXT_SIZE)
