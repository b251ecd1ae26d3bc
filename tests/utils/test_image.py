"""Any image file a user may have is read right or refused in one line; one resize for all."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError
from utils.image import (
    image_mode,
    image_size,
    list_images,
    read_image,
    read_mask,
    read_mask_values,
    resize,
    resize_mask,
    to_input,
)

ORIENTATION = 0x0112


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "BMP", "tif", "TIFF", "webp", "Ppm"])
def test_lossless_formats_give_the_stored_pixels(
    tmp_path: Path, rgb: np.ndarray, suffix: str
) -> None:
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(rgb).save(path, lossless=True)  # for webp; the others ignore it
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg(tmp_path: Path, suffix: str) -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 32, axis=0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}", quality=95)
    assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - ramp).max() <= 4


@pytest.mark.parametrize("suffix", ["pgm", "png", "tif", "bmp", "webp"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    grey = np.ascontiguousarray(rgb[:, :, 0])
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}", lossless=True)
    np.testing.assert_array_equal(
        read_image(tmp_path / f"a.{suffix}"), np.stack([grey] * 3, axis=2)
    )


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_over_the_full_range(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 256 256 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    expected = np.round(values / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=2))


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    big_endian = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    big_endian.save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 1].tolist() == [0, 1, 255]


def test_32_bit_integers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: pixel values outside 0\.\.65535"):
        read_image(tmp_path / "a.tif")


def test_floating_point_is_refused_with_the_remedy(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: floating-point .* save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")


def test_alpha_is_dropped(tmp_path: Path, rgb: np.ndarray) -> None:
    alpha = np.zeros((20, 30, 1), np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), rgb)
    grey_alpha = np.concatenate([rgb[:, :, :1], alpha], axis=2)
    Image.fromarray(grey_alpha).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), rgb[:, :, [0, 0, 0]])


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "p.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    Image.fromarray(bits).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png")[0, :, 0].tolist() == [255, 0, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red = read_image(tmp_path / "ink.jpg")[4, 4].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3


def _stored_for(orientation: int, upright: np.ndarray) -> np.ndarray:
    """Return the pixels a camera stores so that EXIF `orientation` shows `upright`."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # shown by turning it clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(
    tmp_path: Path, rgb: np.ndarray, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(_stored_for(orientation, rgb))
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, lossless=True)
    np.testing.assert_array_equal(read_image(path), rgb)
    assert image_size(path) == (20, 30)


def test_exif_orientation_of_a_jpeg_photo(tmp_path: Path) -> None:
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 255  # bright top left corner
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = np.ascontiguousarray(_stored_for(6, upright))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape == (*image_size(tmp_path / "a.jpg"), 3)
    assert image[4, 4, 0] > 250
    assert image[28, 60, 0] < 5


@pytest.mark.parametrize(
    "name",
    [
        "two words.png",
        "what???.png",
        "[3] a*b.png",
        "瓶子-ü.png",
        "100%.png",
        "a.b.c.png",
        "-q.png",
    ],
)
def test_names_are_taken_literally(tmp_path: Path, rgb: np.ndarray, name: str) -> None:
    Image.fromarray(rgb).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), rgb)
    assert list_images(tmp_path / name) == [tmp_path / name]
    assert list_images(str(tmp_path / name)) == [tmp_path / name]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _broken_files(rgb: np.ndarray) -> dict[str, bytes]:
    good = _png(rgb)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    return {
        "empty.png": b"",
        "text.jpg": b"this is not an image\n" * 20,
        "cut.png": good[: len(good) // 2],
        "header_only.png": good[:20],
        "flipped.png": bytes(flipped),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    }


@pytest.mark.parametrize("name", list(_broken_files(np.zeros((2, 2, 3), np.uint8))))
@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, rgb: np.ndarray, name: str, reader: object
) -> None:
    (tmp_path / name).write_bytes(_broken_files(rgb)[name])
    with pytest.raises(UserError, match="cannot read this image") as caught:
        reader(tmp_path / name)  # type: ignore[operator]
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_jpeg_and_tiff(tmp_path: Path, rng: np.random.Generator) -> None:
    noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.tif"):
        noise.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(UserError, match="cannot read this image"):
            read_image(tmp_path / name)


def test_only_the_listed_decoders_run(tmp_path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png", format="GIF")
    with pytest.raises(UserError, match=r"its content is none of PNG, JPEG"):
        read_image(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png: cannot read this image: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot read this image"):
        read_image(tmp_path)


def test_decompression_bomb(
    tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(rgb).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 600 pixels are more than twice that
    with pytest.raises(UserError, match=r"bomb\.png: cannot read this image: .*bomb"):
        read_image(tmp_path / "bomb.png")


def test_image_mode_is_that_of_the_file(tmp_path: Path) -> None:
    Image.new("LA", (3, 2)).save(tmp_path / "a.png")
    assert image_mode(tmp_path / "a.png") == "LA"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255, 255], [False, True, True]),
        ([0, 1, 2], [False, True, True]),  # class indices
        ([0, 1, 127], [False, True, True]),
        ([3, 128, 254], [False, True, True]),  # a drawing with compression noise
        ([127, 128, 255], [False, True, True]),
        ([0, 0, 0], [False, False, False]),
    ],
)
def test_mask_values(tmp_path: Path, values: list[int], expected: list[bool]) -> None:
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert mask.dtype == bool
    assert mask.tolist() == [expected]
    assert read_mask_values(tmp_path / "m.png").tolist() == [values]


def test_mask_of_other_pixel_formats(tmp_path: Path) -> None:
    expected = [[False, True]]
    Image.fromarray(np.array([[0, 1]], np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.array([[[0, 0, 0], [0, 0, 255]]], np.uint8)).save(tmp_path / "blue.png")
    Image.fromarray(np.array([[[0, 0, 0, 255], [9, 0, 0, 255]]], np.uint8)).save(
        tmp_path / "rgba.png"
    )
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bit.png")
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "float.tif")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    for path in sorted(tmp_path.iterdir()):
        assert read_mask(path).tolist() == expected, path.name


def test_jpeg_mask_has_no_rim_of_compression_noise(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), bool)
    mask[13:41, 21:50] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=75)
    assert (read_mask_values(tmp_path / "m.jpg") > 0).sum() > mask.sum() + 50
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), mask)


def _triangle_weights(n_in: int, n_out: int) -> np.ndarray:
    """Return (n_out, n_in) weights of antialiased bilinear resampling: a widened triangle."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    centres = (np.arange(n_out)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(n_in)[None] + 0.5 - centres) / width, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(7, 11), (40, 60), (20, 30), (9, 64)])
def test_pil_resize_is_antialiased_bilinear(rgb: np.ndarray, size: tuple[int, int]) -> None:
    rows, columns = _triangle_weights(20, size[0]), _triangle_weights(30, size[1])
    expected = np.einsum("yh,hwc,xw->yxc", rows, rgb.astype(float), columns)
    resized = resize(rgb, size)
    assert resized.shape == (*size, 3)
    assert np.abs(resized - expected).max() <= 1.01  # Pillow rounds after each direction


@pytest.mark.parametrize("size", [(7, 11), (40, 60), (20, 30), (9, 64)])
def test_cv2_resize_is_bilinear_without_antialiasing(
    rgb: np.ndarray, size: tuple[int, int]
) -> None:
    def weights(n_in: int, n_out: int) -> np.ndarray:
        position = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        return np.clip(1 - np.abs(np.arange(n_in)[None] - position[:, None]), 0, None)

    expected = np.einsum(
        "yh,hwc,xw->yxc", weights(20, size[0]), rgb.astype(float), weights(30, size[1])
    )
    assert np.abs(resize(rgb, size, "cv2") - expected).max() <= 1.01


def test_cv2_resize_is_what_paddle_does_with_arrays(rgb: np.ndarray) -> None:
    functional = pytest.importorskip("paddle.vision.transforms.functional")
    expected = functional.resize(rgb, (13, 17), "bilinear")
    np.testing.assert_array_equal(resize(rgb, (13, 17), "cv2"), expected)
    assert np.abs(resize(rgb, (13, 17)).astype(int) - expected).max() > 20  # they do differ


def test_unknown_resize_method(rgb: np.ndarray) -> None:
    with pytest.raises(UserError, match="'area' is unknown: choose 'pil', 'lanczos' or 'cv2'"):
        resize(rgb, (4, 4), "area")


@pytest.mark.parametrize("size", [(5, 7), (40, 90), (33, 31)])
def test_resize_mask_takes_the_nearest_pixel_centre(
    rng: np.random.Generator, size: tuple[int, int]
) -> None:
    mask = rng.random((20, 30)) > 0.5
    rows = np.floor((np.arange(size[0]) + 0.5) * 20 / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * 30 / size[1]).astype(int)
    resized = resize_mask(mask, size)
    assert resized.dtype == bool
    np.testing.assert_array_equal(resized, mask[np.ix_(rows, columns)])


def test_to_input(rgb: np.ndarray) -> None:
    tensor = to_input(rgb, (20, 30))
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor, (rgb / np.float32(255)).transpose(2, 0, 1))
    shrunk = to_input(rgb, (6, 8), "cv2")
    np.testing.assert_array_equal(
        np.round(shrunk * 255), resize(rgb, (6, 8), "cv2").transpose(2, 0, 1)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "line [2]"
    for name in (
        "b.png", "a.JPG", "Z.png", "é.png", "notes.txt", ".hidden.png", "sub/c.tif",
        "sub/.cache/d.png", "folder.png/e.bmp", "a*b.png",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_list_folder(folder: Path) -> None:
    found = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    assert found == ["Z.png", "a*b.png", "a.JPG", "b.png", "folder.png/e.bmp", "sub/c.tif", "é.png"]


def test_list_pattern(folder: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [path.name for path in list_images(str(folder / pattern))]

    assert names("*.png") == ["Z.png", "a*b.png", "b.png", "é.png"]  # "[2]" of the folder literally
    assert names("[ab].*") == ["a.JPG", "b.png"]
    assert names("**/*.tif") == ["c.tif"]
    assert names("a*b.png") == ["a*b.png"]
    assert names("**.png") == names("*.png")


def test_list_relative_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list_images("*.JPG") == [Path("a.JPG")]
    assert list_images("sub") == [Path("sub/c.tif")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("*.gif", "no images here; looked for .png"),
        ("*.txt", "no images here"),
        (".h*.png", "no images here"),
    ],
)
def test_list_errors(folder: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_images(folder / source)


def test_list_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image given"):
        list_images("")
    with pytest.raises(UserError, match="no images here"):
        list_images(tmp_path)
