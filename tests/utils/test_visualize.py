"""Pictures of predictions: fixed colours, exact outlines and regions, sizes, names, text."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from utils import visualize
from utils.errors import UserError
from utils.visualize import (
    PREDICTED,
    TRUTH,
    contours,
    heat_map,
    overlay,
    regions,
    resize_map,
    safe_name,
    save_picture,
)


def panel(image: np.ndarray, anomaly_map: np.ndarray, cut: float, *more: Any, **named: Any) -> Any:
    """Compose a panel whose predicted region lies above a cut, marked on the colour bar."""
    predicted = resize_map(anomaly_map, image.shape[:2]) > cut
    return visualize.panel(image, anomaly_map, predicted, *more, **{"level": cut, **named})


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _square(height: int = 40, width: int = 60) -> np.ndarray:
    """Return a mask whose square covers rows 10..19 and columns 20..34."""
    mask = np.zeros((height, width), bool)
    mask[10:20, 20:35] = True
    return mask


def _has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(axis=2)


def test_one_value_has_one_colour_in_every_map(rng: np.random.Generator) -> None:
    quiet, loud = rng.uniform(0, 0.3, (8, 8)), rng.uniform(0, 50, (8, 8))
    quiet[3, 4] = loud[5, 6] = 0.25
    first, second = heat_map(quiet, 0, 2), heat_map(loud, 0, 2)
    np.testing.assert_array_equal(first[3, 4], second[5, 6])
    assert first.dtype == np.uint8
    assert first.shape == (8, 8, 3)


def test_colours_run_from_dark_to_bright_and_stop_at_the_ends() -> None:
    ramp = heat_map(np.linspace(-1, 4, 200)[None], 1.0, 3.0)[0].astype(float)
    lightness = ramp @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) > -1.0).all()
    assert lightness[0] < 5
    assert lightness[-1] > 225
    np.testing.assert_array_equal(ramp[0], heat_map(np.array([[1.0]]), 1, 3)[0, 0])
    np.testing.assert_array_equal(ramp[-1], heat_map(np.array([[3.0]]), 1, 3)[0, 0])


def test_red_is_the_first_channel() -> None:
    warm = heat_map(np.array([[0.7]]), 0, 1)[0, 0]
    assert warm[0] > 200 > 60 > warm[2]


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan"))])
def test_a_scale_that_does_not_rise_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="must rise"):
        heat_map(np.zeros((2, 2)), low, high)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_refused(bad: float) -> None:
    broken = np.array([[0.0, bad]])
    with pytest.raises(UserError):
        heat_map(broken, 0, 1)


def test_overlay_mixes_image_and_colours() -> None:
    image = np.full((6, 9, 3), 200, np.uint8)
    anomaly_map = np.full((3, 3), 0.4)
    colour = heat_map(anomaly_map, 0, 1)[0, 0].astype(float)
    np.testing.assert_array_equal(overlay(image, anomaly_map, 0, 1, alpha=0.0), image)
    solid = overlay(image, anomaly_map, 0, 1, alpha=1.0)
    np.testing.assert_array_equal(solid, np.broadcast_to(colour, image.shape))
    half = overlay(image, anomaly_map, 0, 1, alpha=0.25)
    np.testing.assert_allclose(half[2, 2], 0.75 * 200 + 0.25 * colour, atol=0.5)


@pytest.mark.parametrize("width", [1, 2])
def test_outline_is_the_rim_of_the_mask_exactly(width: int) -> None:
    mask = _square()
    image = np.full((*mask.shape, 3), 128, np.uint8)
    drawn = contours(image, mask, PREDICTED, width)
    rim = mask.copy()
    rim[10 + width : 20 - width, 20 + width : 35 - width] = False
    np.testing.assert_array_equal(_has_colour(drawn, PREDICTED), rim)
    halo = ndimage.binary_dilation(mask) & ~mask
    np.testing.assert_array_equal(_has_colour(drawn, (0, 0, 0)), halo)
    assert (drawn[~rim & ~halo] == 128).all()
    assert (image == 128).all()


def test_outline_closes_at_the_border_of_the_picture() -> None:
    mask = np.ones((7, 9), bool)
    drawn = contours(np.zeros((7, 9, 3), np.uint8), mask, TRUTH)
    assert _has_colour(drawn, TRUTH).sum() == 7 * 9 - 5 * 7


def test_regions_of_two_squares_and_a_pixel() -> None:
    anomaly_map = np.zeros((30, 50), np.float32)
    anomaly_map[10:20, 20:35] = 0.6
    anomaly_map[12, 30] = 0.9
    anomaly_map[2:4, 1:3] = 2.0
    anomaly_map[29, 49] = 0.7
    assert regions(anomaly_map, anomaly_map > 0.5) == [
        {"x": 1, "y": 2, "w": 2, "h": 2, "area": 4, "peak": 2.0},
        {"x": 20, "y": 10, "w": 15, "h": 10, "area": 150, "peak": pytest.approx(0.9)},
        {"x": 49, "y": 29, "w": 1, "h": 1, "area": 1, "peak": pytest.approx(0.7)},
    ]
    assert regions(anomaly_map, anomaly_map > 2.0) == []


def test_regions_agree_with_another_labelling(rng: np.random.Generator) -> None:
    anomaly_map = rng.random((60, 45))
    labels, count = ndimage.label(anomaly_map > 0.7, structure=np.ones((3, 3)))
    expected = []
    for k, (ys, xs) in enumerate(ndimage.find_objects(labels), start=1):
        values = anomaly_map[labels == k]
        box = (xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start)
        expected.append((*box, values.size, values.max()))
    found = regions(anomaly_map, anomaly_map > 0.7)
    assert len(found) == count
    assert sorted(tuple(region.values()) for region in found) == sorted(expected)
    assert [r["peak"] for r in found] == sorted((r["peak"] for r in found), reverse=True)


def test_map_is_resized_bilinearly_about_pixel_centres(rng: np.random.Generator) -> None:
    small = rng.random((6, 5)).astype(np.float32)
    rows, columns = (np.arange(24) + 0.5) / 4 - 0.5, (np.arange(10) + 0.5) / 2 - 0.5
    grid = np.meshgrid(rows, columns, indexing="ij")
    expected = ndimage.map_coordinates(small, grid, order=1, mode="nearest")
    np.testing.assert_allclose(resize_map(small, (24, 10)), expected, atol=1e-6)
    np.testing.assert_array_equal(resize_map(small.astype(np.float16), (6, 5)), np.float16(small))


@pytest.mark.parametrize("shape", [(320, 320), (100, 700), (600, 90), (5, 3)])
@pytest.mark.parametrize("tile", [256, 128])
def test_panel_has_one_size_whatever_the_image(
    rng: np.random.Generator, shape: tuple[int, int], tile: int
) -> None:
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    anomaly_map = rng.random((64, 64)).astype(np.float32)
    two = panel(image, anomaly_map, 0.5, 0, 1, "one\ntwo", tile=tile)
    three = panel(image, anomaly_map, 0.5, 0, 1, "one\ntwo", np.zeros(shape, bool), tile)
    assert two.dtype == np.uint8
    assert two.shape[0] == three.shape[0]
    assert three.shape[1] - two.shape[1] == tile + visualize.PAD
    assert tile < two.shape[0] < tile + 90
    assert 2 * tile < two.shape[1] < 2 * tile + 110


def test_panel_outlines_prediction_and_truth_in_their_own_tiles() -> None:
    image = np.full((256, 256, 3), 255, np.uint8)
    mask = np.zeros((256, 256), bool)
    mask[100:140, 60:90] = True
    shown = panel(image, mask.astype(np.float32), 0.5, 0, 1, "t", ground_truth=mask.T)
    top, step = visualize.PAD + visualize.LINE, 256 + visualize.PAD
    for number, (colour, drawn) in enumerate(((PREDICTED, mask), (TRUTH, mask.T)), start=1):
        left = visualize.PAD + number * step
        area = _has_colour(shown[top : top + 256, left : left + 256], colour)
        rim = drawn & ~ndimage.binary_erosion(drawn, iterations=2)
        np.testing.assert_array_equal(area, rim)
    clean = shown[top : top + 256, visualize.PAD : visualize.PAD + 256]
    assert (clean == 255).all()


def test_a_single_pixel_of_a_large_image_is_still_outlined() -> None:
    anomaly_map = np.zeros((1000, 1500), np.float32)
    anomaly_map[501, 733] = 1
    shown = panel(np.full((1000, 1500, 3), 255, np.uint8), anomaly_map, 0.5, 0, 1)
    middle = shown[:256, 256 + 2 * visualize.PAD : 2 * (256 + visualize.PAD)]
    assert 1 <= _has_colour(middle, PREDICTED).sum() <= 4


def test_threshold_off_the_scale_is_not_marked_on_the_bar() -> None:
    image, flat = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.float32)

    def marks(threshold: float) -> int:
        bar = panel(image, flat, threshold, 0, 1)[:, -visualize.BAR :]
        return int(_has_colour(bar, PREDICTED).sum())

    assert marks(0.5) > 0
    assert marks(1.5) == 0


@pytest.mark.parametrize(
    "title",
    [
        "",
        "größe ≠ ошибка Phân tích",
        "检测 결과 \U0001f600",
        "tab\tand \udcff",
        "x" * 3000,
        "a\nb\nc",
    ],
)
def test_any_title_can_be_drawn(title: str) -> None:
    image = np.zeros((30, 30, 3), np.uint8)
    shown = panel(image, np.zeros((30, 30), np.float32), 0.5, 0, 1, title)
    plain = panel(image, np.zeros((30, 30), np.float32), 0.5, 0, 1)
    lines = len(title.splitlines())
    assert shown.shape[0] - plain.shape[0] == lines * visualize.LINE
    strip = shown[: visualize.PAD + visualize.LINE * lines - 4]
    assert (strip < 100).any() == bool(title)
    assert (shown[:, -2:] == visualize.PAPER).all()


def test_accented_text_is_written_not_boxed() -> None:
    font = visualize._font_for("ễ")
    assert visualize._has(font, "ễ")
    assert not visualize._has(font, "\U0010fffe")


def test_without_any_font_file_the_one_in_pillow_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualize.importlib.util, "find_spec", lambda name: None)
    visualize._font.cache_clear()
    try:
        assert visualize._font("").getlength("score") > 10
    finally:
        visualize._font.cache_clear()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".BMP"])
def test_pictures_are_saved_under_any_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "новая папка" / f"检测 ü{suffix}"
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[..., 0] = 250
    save_picture(path, rgb)
    with Image.open(path) as image:
        np.testing.assert_allclose(np.array(image.convert("RGB")), rgb, atol=6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_unknown_picture_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.gif"):
        save_picture(tmp_path / "a.gif", np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize("text", ["000", "good_000", "ảnh-1", "检测", "a b.c"])
def test_harmless_names_are_kept(text: str) -> None:
    assert safe_name(text) == text


def test_awkward_names_become_safe_and_stay_distinct(tmp_path: Path) -> None:
    texts = [
        *("a:b", "a?b", "a*b", "a/b", "a\\b", 'a"b', "a<b", "a>b", "a|b", "a\nb", "a\x7fb", "a_b"),
        *("", ".", "..", " a", "a ", "a.", ".a", "CON", "con.txt", "nul", "LPT1"),
        *("é", "e\u0301", "x" * 300, "x" * 301, "检" * 200, "\udcff", "\udcfe"),
    ]
    names = [safe_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert not set(name) & set('<>:"/\\|?*\n\x7f')
        assert name == name.strip(" .") != ""
        assert len(os.fsencode(name)) <= 130
        assert name.split(".")[0].upper() not in {"CON", "NUL", "LPT1"}
        (tmp_path / name).write_text("")
    assert len(list(tmp_path.iterdir())) == len(texts)
    assert names == [safe_name(text) for text in texts]


def test_it_needs_no_paddle(repo: Path) -> None:
    code = "import sys, utils.visualize; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo, check=False).returncode == 0


def test_inferno_is_the_published_one() -> None:
    """OpenCV's table against Matplotlib's."""
    matplotlib = pytest.importorskip("matplotlib")
    table = np.rint(np.array(matplotlib.colormaps["inferno"].colors) * 255)
    np.testing.assert_allclose(heat_map(np.arange(256.0)[None], 0, 255)[0], table, atol=1)
