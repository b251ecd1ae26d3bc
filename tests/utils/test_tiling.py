"""Tiles: where windows lie, seams, scores, NFA, memory, and what is refused."""

import math
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image
from scipy.ndimage import uniform_filter

from engine.evaluator import run
from metrics.acontrario import AContrario
from metrics.nfa import Null
from metrics.threshold import fixed, percentile
from metrics.threshold import nfa as nfa_threshold
from utils.errors import UserError
from utils.image import to_input
from utils.predictions import Output, PhotoReader
from utils.tiling import LARGE, Tiler, Tiling, chosen_tiling, cuts, large_images
from utils.visualize import resize_map

LENGTHS = (1, 31, 32, 33, 63, 64, 65, 100, 131, 500)
OVERLAPS = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 0.89)


class LocalNetwork:
    """Answer with a local mean of the first channel, zeros beyond the border: it is convolutional.

    The score is the largest value of the map. Remembers the batches it was given.
    """

    def __init__(self, radius: int) -> None:
        self.radius = radius
        self.batches: list[int] = []

    def __call__(self, images: np.ndarray) -> Output:
        self.batches.append(len(images))
        width = 2 * self.radius + 1
        maps = np.stack([uniform_filter(each[0], width, mode="constant") for each in images])
        return Output(maps, maps.max((1, 2)))


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiler(network, side: int = 64, overlap: float = 0.25, batch_size: int = 3, **more) -> Tiler:
    """Return one whose tiles are not resized: the network takes `side` pixels."""
    reader = PhotoReader((side, side), more.pop("method", "pil"))
    return Tiler(network, reader, Tiling((side, side), overlap), batch_size, **more)


def untiled(network: LocalNetwork, pixels: np.ndarray) -> np.ndarray:
    image = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return network(image[None])[0][0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_windows_are_whole_and_their_weights_sum_to_one(length, overlap):
    tile = 32
    total = np.zeros(length)
    found = cuts(length, tile, overlap)
    for cut in found:
        assert cut.window.start >= 0
        assert cut.window.stop <= length
        assert cut.window.stop - cut.window.start == min(tile, length)
        assert len(cut.weights) == cut.inner.stop - cut.inner.start
        assert cut.weights.min() > 0
        total[cut.window][cut.inner] += cut.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (found[0].window.start, found[-1].window.stop) == (0, length)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_next_to_an_inner_border_of_a_window_nothing_counts(overlap):
    """A quarter of the overlap is the dead margin; at the ends of the image there is none."""
    tile, length = 64, 300
    step = round(tile * (1 - overlap))
    margin = (tile - step) // 4
    found = cuts(length, tile, overlap)
    starts = [cut.window.start for cut in found]
    assert starts[:-1] == list(range(0, length - tile, step))
    assert starts[-1] == length - tile  # shifted inwards
    for number, cut in enumerate(found):
        assert cut.inner.start >= (margin if number else 0)
        assert cut.inner.stop <= tile - (margin if number < len(found) - 1 else 0)
    assert found[0].inner.start == 0
    assert found[-1].inner.stop == tile


def test_the_number_of_windows():
    assert len(Tiling((512, 512)).windows((4096, 4096))) == 11 * 11
    assert len(Tiling((512, 512), 0.0).windows((4096, 4096))) == 8 * 8
    assert len(Tiling((32, 64), 0.0).windows((64, 64))) == 2
    assert len(Tiling((512, 512)).windows((100, 512))) == 1


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(150, 200), (64, 131), (65, 64), (64, 64)])
def test_a_local_network_gives_the_map_of_the_whole_image(size, overlap):
    """To rounding, everywhere, with a reach as wide as the dead margin."""
    network = LocalNetwork(radius=4)  # a quarter of 0.25·64
    pixels = photograph(*size)
    found = tiler(network, overlap=overlap).judge(pixels)
    whole = untiled(network, pixels)
    np.testing.assert_allclose(found.anomaly_map, whole, atol=1e-6)
    assert found.score == pytest.approx(whole.max(), abs=1e-6)
    assert found.anomaly_map.dtype == np.float32


@pytest.mark.parametrize("size", [(40, 30), (64, 64), (20, 200)])
def test_an_axis_shorter_than_the_tile_is_taken_whole(size):
    """An image no larger than a tile in either axis is judged as without tiles."""
    network = LocalNetwork(radius=2)
    pixels = photograph(*size)
    cutter = Tiler(network, PhotoReader((48, 48), "pil"), Tiling((64, 64)), 1)
    found = cutter.judge(pixels)
    assert found.anomaly_map.shape == size
    assert found.about is not None
    if max(size) > 64:
        assert found.about["tiles"] == 4
        return
    maps, scores, *_ = network(to_input(pixels, (48, 48))[None])
    np.testing.assert_array_equal(found.anomaly_map, resize_map(maps[0], size))
    assert found.score == scores[0]
    assert found.about["tiles"] == 1


def test_a_wider_reach_than_the_margin_shows():
    """So the test above does see borders."""
    network = LocalNetwork(radius=12)
    pixels = photograph(150, 200)
    found = tiler(network).judge(pixels).anomaly_map
    assert np.abs(found - untiled(network, pixels)).max() > 0.01


def test_a_paddle_detector_without_padding_effects():
    """The same through tensors: two 3x3 convolutions, reach 2."""

    class Local(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first = paddle.nn.Conv2D(3, 4, 3, padding=1)
            self.second = paddle.nn.Conv2D(4, 1, 3, padding=1)

        def forward(self, image):
            found = self.second(paddle.tanh(self.first(image)))
            return found, found.max([1, 2, 3]), found.mean([1, 2, 3])

    paddle.seed(0)
    detector = Local()
    pixels = photograph(100, 140)
    found = tiler(lambda images: run(detector, images), overlap=0.125).judge(pixels)
    whole = run(detector, pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(found.anomaly_map, whole.maps[0], atol=1e-5)
    assert found.score >= whole.scores[0] - 1e-5  # borders of windows count in their scores


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_constant_map_stays_constant(overlap):
    def network(images: np.ndarray) -> Output:
        scores = np.full(len(images), 0.7)
        return Output(np.full((len(images), 16, 16), 0.7, np.float32), scores)

    found = tiler(network, overlap=overlap).judge(photograph(130, 257))
    np.testing.assert_allclose(found.anomaly_map, 0.7, atol=1e-6)


def test_from_one_window_to_the_next_the_map_goes_over_smoothly():
    """Windows that disagree leave no edge: over the overlap of 64 pixels a step of at most 1/32."""
    numbers = iter(range(2))

    def network(images: np.ndarray) -> Output:
        maps = np.stack([np.full((128, 128), next(numbers), np.float32) for _ in images])
        return Output(maps, maps.max((1, 2)))

    row = tiler(network, side=128, overlap=0.5).judge(photograph(128, 192)).anomaly_map[0]
    assert (row[0], row[-1]) == (0, 1)
    steps = np.diff(row)
    assert steps.min() >= 0
    assert steps.max() <= 1 / 32 + 1e-6


@pytest.mark.parametrize("method", ["pil", "lanczos", "cv2"])
def test_every_window_is_an_image_of_its_own(method):
    """Resized as images are, its map brought back to its place; the highest score counts."""
    pixels = photograph(64, 160)
    pixels[10:40, 70:90] = 255
    seen: list[np.ndarray] = []

    def network(images: np.ndarray) -> Output:
        seen.extend(images)
        mean = images.mean((1, 2, 3))
        return Output(images[:, 0, ::2, ::2], mean, nll=mean)

    reader = PhotoReader((32, 48), method)
    found = Tiler(network, reader, Tiling((64, 64), 0.0), 2).judge(pixels)
    starts = (0, 64, 96)
    assert len(seen) == len(starts)
    for start, window in zip(starts, seen, strict=True):
        cut_out = np.ascontiguousarray(pixels[:, start : start + 64])
        np.testing.assert_array_equal(window, to_input(cut_out, (32, 48), method))
    assert found.score == pytest.approx(seen[1].mean(), abs=1e-6)
    assert found.score > max(seen[0].mean(), seen[2].mean())
    row, column = np.unravel_index(np.argmax(found.anomaly_map), found.anomaly_map.shape)
    assert 10 <= row < 40
    assert 70 <= column < 90
    assert found.about == {"tile": [64, 64], "overlap": 0.0, "tiles": 3}


def test_a_score_that_is_no_number_is_not_lost():
    def network(images: np.ndarray) -> Output:
        scores = np.arange(len(images), dtype=np.float32)
        scores[0] = math.nan
        return Output(images[:, 0], scores)

    assert math.isnan(tiler(network, batch_size=2).judge(photograph(64, 300)).score)


def test_batches_do_not_change_results_and_are_not_exceeded():
    pixels = photograph(150, 200)
    results = []
    for batch_size in (1, 4, 100):
        network = LocalNetwork(radius=3)
        results.append(tiler(network, batch_size=batch_size).judge(pixels))
        assert max(network.batches) == min(batch_size, 12)
        assert sum(network.batches) == 12
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].anomaly_map, other.anomaly_map)
        assert results[0].score == other.score


def test_memory_is_bounded_by_the_map_and_a_batch_of_tiles():
    """Cutting 16 megapixels costs the map of 64 MiB and less than 20 MiB beside it."""
    pixels = np.zeros((4096, 4096, 3), np.uint8)

    def network(images: np.ndarray) -> Output:
        return Output(images[:, 0, ::4, ::4], images[:, 0, 0, 0])

    cutter = tiler(network, side=512, batch_size=2)  # 6 MiB of windows
    tracemalloc.start()
    try:
        found = cutter.judge(pixels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.about is not None
    assert found.about["tiles"] == 121
    assert peak < found.anomaly_map.nbytes + 20 * 2**20


def evidence_test() -> AContrario:
    return AContrario("tree", (64, 64), (8, 8), (Null(8.0, 8.0), Null(8.0, 8.0)))


def evidence_of(images: np.ndarray) -> Output:
    """Give chi-square evidence of two levels, much of it where an image is white."""
    white = images[:, 0] == 1
    levels = [8.0 + 60.0 * white[:, ::step, ::step] for step in (8, 16)]
    return Output(images[:, 0], images.max((1, 2, 3)), levels)


def test_nfa_counts_all_tiles():
    """n tiles have n times the expected false detections of one: log10 n less evidence."""
    test = evidence_test()
    pixels = np.full((64, 640, 3), 100, np.uint8)
    pixels[16:48, 16:48] = 255
    alone = tiler(evidence_of, acontrario=test).judge(pixels[:, :64]).nfa
    image = pixels.transpose(2, 0, 1)[None, :, :, :64] / 255
    expected = test.score([level[0] for level in evidence_of(image)[2]])
    assert alone is not None
    np.testing.assert_allclose(alone[0], expected, rtol=1e-5)
    assert alone[1] == expected.max() > 1
    found = tiler(evidence_of, overlap=0.0, acontrario=test).judge(pixels)
    assert found.about is not None
    assert found.about["tiles"] == 10
    assert found.nfa is not None
    many, peak = found.nfa
    assert many.shape == (64, 640)
    np.testing.assert_allclose(many[:, :32], alone[0][:, :32] - 1, rtol=1e-4)
    assert many[:, 64:].max() < 0
    assert peak == alone[1] - 1
    assert tiler(evidence_of).judge(pixels).nfa is None


@pytest.mark.parametrize(
    ("tile", "overlap", "expected"),
    [
        (None, None, None),
        ("512", None, Tiling((512, 512), 0.25)),
        ("384x512", 0.5, Tiling((384, 512), 0.5)),
        ("32", 0.0, Tiling((32, 32), 0.0)),
    ],
)
def test_the_flags(tile, overlap, expected):
    assert chosen_tiling(tile, overlap) == expected


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (None, 0.25, r"--overlap 0\.25: has no effect without --tile"),
        (None, 0.0, r"--overlap 0: has no effect without --tile"),
        ("31", None, r"--tile 31x31: too small; give at least 32 pixels"),
        ("512x8", None, r"--tile 512x8: too small"),
        ("0", None, "too small"),
        ("-5", None, "must be whole pixels"),
        ("big", None, "--tile 'big': must be whole pixels, 512 for squares"),
        ("512x", None, "must be whole pixels"),
        ("", None, "must be whole pixels"),
        ("1e3", None, "must be whole pixels"),
        ("512", 0.9, r"--overlap 0\.9: must be a share of the tile from 0 to less than 0\.9"),
        ("512", -0.1, "must be a share"),
        ("512", 25.0, r"--overlap 25: must be a share"),
        ("512", math.nan, "must be a share"),
    ],
)
def test_flags_that_are_refused(tile, overlap, message):
    with pytest.raises(UserError, match=message) as caught:
        chosen_tiling(tile, overlap)
    assert "\n" not in str(caught.value)


def test_what_a_threshold_means_for_tiles_is_said_in_one_line():
    tiling = Tiling((384, 512))
    for threshold in (fixed(0.5), percentile(np.arange(99.0))):
        line = tiling.caution(threshold)
        assert line.startswith("warning: tiles of 384x512, overlap 0.25: ")
        assert "applies per tile" in line
        assert "trained on images like the tiles" in line
    line = tiling.caution(nfa_threshold([-1.0, -2.0]))
    assert "the NFA of an image counts all of its tiles" in line
    assert "per tile" not in line


def saved(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def judged(paths: Sequence[Path], monkeypatch) -> tuple[list[Any], PhotoReader]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice that is refused
    cutter = tiler(LocalNetwork(1))
    return list(cutter.images(paths)), cutter.reader


def test_large_images_are_read(tmp_path, monkeypatch):
    """Pillow's guard against decompression bombs is raised for as long as tiles are cut."""
    pixels = photograph(100, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((original, found),), _ = judged([saved(tmp_path / "a.png", pixels)], monkeypatch)
    np.testing.assert_array_equal(original.pixels, pixels)
    assert found.anomaly_map.shape == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_guard_of_pillow_comes_back_after_an_error(tmp_path, monkeypatch):
    bad = tmp_path / "x.png"
    bad.write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read this image"):
        judged([bad], monkeypatch)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with large_images():
        assert Image.MAX_IMAGE_PIXELS == LARGE
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with large_images():
        assert Image.MAX_IMAGE_PIXELS is None


def test_unreadable_images_are_skipped(tmp_path, monkeypatch):
    bad = tmp_path / "x.png"
    bad.write_bytes(b"broken")
    good = saved(tmp_path / "a.png", photograph(70, 70))
    found, reader = judged([bad, good], monkeypatch)
    assert [original.path for original, _ in found] == [good]
    assert "skipped 1 unreadable image(s)" in reader.warning()
