"""Predictions: batches of photos, verdicts, files of one call."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from metrics.drift import Drift, NormalNll
from metrics.threshold import Threshold, fixed
from utils.errors import UserError
from utils.image import read_image
from utils.predictions import (
    Found,
    Original,
    Output,
    Photo,
    PhotoReader,
    PredictionWriter,
    chosen_output,
    chosen_threshold,
    console_line,
    scale_around,
    verdict,
    whole_images,
)
from utils.visualize import PREDICTED, TRUTH


def save(path: Path, height: int = 40, width: int = 120, *, grey: bool = False) -> Path:
    shape = (height, width) if grey else (height, width, 3)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", values)[1].tobytes())
    return path


def damaged(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path


def photo(path: Path) -> Photo:
    pixels = read_image(path)
    return Photo(path, pixels, np.zeros((3, 8, 8), np.float32))


def writer(folder: Path, **options) -> PredictionWriter:
    return PredictionWriter(folder, fixed(0.5), fixed(0.6), (0.0, 1.0), **options)


def lines(folder: Path) -> list[dict]:
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_batches_hold_what_the_network_sees(tmp_path):
    paths = [save(tmp_path / f"{i}.png", grey=i == 1) for i in range(5)]
    batches = list(PhotoReader((16, 24), "pil").batches(paths, 2))
    assert [[p.path for p in batch] for batch in batches] == [paths[:2], paths[2:4], paths[4:]]
    for batch in batches:
        for each in batch:
            assert each.pixels.shape == (40, 120, 3)
            assert each.network_input.shape == (3, 16, 24)
            assert each.network_input.dtype == np.float32


def test_unreadable_images_are_counted_and_do_not_thin_out_batches(tmp_path):
    paths = [damaged(tmp_path / "0.png"), *(save(tmp_path / f"{i}.png") for i in range(1, 5))]
    paths.insert(3, damaged(tmp_path / "x.png"))
    reader = PhotoReader((8, 8), "pil")
    assert [len(batch) for batch in reader.batches(paths, 2)] == [2, 2]
    assert reader.warning().startswith("warning: skipped 2 unreadable image(s): ")
    assert str(paths[0]) in reader.warning()
    assert PhotoReader((8, 8), "pil").warning() == ""


def test_nothing_readable_is_an_error(tmp_path):
    alone = [damaged(tmp_path / "0.png")]
    with pytest.raises(UserError, match=r"0\.png: cannot read this image"):
        list(PhotoReader((8, 8), "pil").batches(alone, 2))
    both = [*alone, damaged(tmp_path / "1.png")]
    with pytest.raises(UserError, match="none of 2 images can be read"):
        list(PhotoReader((8, 8), "pil").batches(both, 2))


def test_thresholds():
    stored = Threshold(0.3, "percentile:99", normals=9)
    assert chosen_threshold(None, stored, "--t") is stored
    assert chosen_threshold(0.0, stored, "--t") == fixed(0.0)
    with pytest.raises(UserError, match=r"no threshold stored yet.* give --t"):
        chosen_threshold(None, None, "--t")


def test_a_tie_is_normal():
    assert verdict(0.5, fixed(0.5)) == "Normal"
    assert verdict(np.nextafter(0.5, 1), fixed(0.5)) == "Anomaly"


@pytest.mark.parametrize("value", [0.8, 0.0, -0.3])
def test_a_scale_without_stored_one_rises_around_the_threshold(value):
    low, high = scale_around(fixed(value))
    assert low < value < high
    assert value - low == pytest.approx(high - value)


def test_the_seeds_console_form():
    """`Normal - score:  0.614`: two blanks, three decimals (cli.md §4)."""
    result = {"verdict": "Normal", "score": 0.6144, "path": "a/b.png"}
    assert console_line(result, alone=True) == "Normal - score:  0.614"
    assert console_line(result, alone=False) == "Normal - score:  0.614  a/b.png"


def test_results(tmp_path):
    out = tmp_path / "out"
    first, second = (photo(save(tmp_path / f"{n}.png")) for n in ("a", "b"))
    made = writer(out)
    hot = np.zeros((8, 8), np.float32)
    hot[2:4, 6:8] = 0.9
    result = made.add(first, Found(hot, np.float32(0.75)))
    made.add(second, Found(np.zeros((8, 8), np.float32), np.float32(0.25)))
    assert not (out / "results.jsonl").exists()  # it appears whole
    made.close()
    stored, normal = lines(out)
    assert stored == result
    assert stored["path"] == str(first.path)
    assert (stored["score"], stored["threshold"], stored["verdict"]) == (0.75, 0.5, "Anomaly")
    assert stored["pixel_threshold"] == 0.6
    assert stored["map_max"] == pytest.approx(0.9)
    assert stored["map_mean"] == pytest.approx(0.9 * 4 / 64)
    assert (normal["verdict"], normal["regions"]) == ("Normal", [])
    assert (out / stored["picture"]).is_file()
    assert read_image(out / stored["overlay"]).shape == read_image(Path(stored["path"])).shape
    assert "map" not in stored


def test_regions_and_maps_are_in_the_geometry_of_the_photo(tmp_path):
    """Map rows 2–3 of 8 are photo rows 10–19 of 40, columns 6–7 of 8 are 90–119 of 120."""
    hot = np.zeros((8, 8), np.float32)
    hot[2:4, 6:8] = 0.9
    made = writer(tmp_path / "out", maps=True)
    result = made.add(photo(save(tmp_path / "a.png", grey=True)), Found(hot, 0.75))
    (region,) = result["regions"]
    assert region["x"] == pytest.approx(90, abs=5)
    assert region["y"] == pytest.approx(10, abs=2)
    assert region["w"] == pytest.approx(30, abs=5)
    assert region["h"] == pytest.approx(10, abs=4)
    full = np.load(tmp_path / "out" / result["map"])
    assert full.shape == (40, 120)
    assert full.dtype == np.float32
    assert full[14, 110] == pytest.approx(0.9)
    assert full[14, 20] == full[35, 110] == 0


def test_names_of_files(tmp_path):
    names = ["what?.png", "with space.png", "瓶子.png", "sub/a.png", "a.png", "A.png", "a_2.png"]
    made = writer(tmp_path / "out", maps=True)
    for name in names:
        made.add(photo(save(tmp_path / name)), Found(np.zeros((8, 8), np.float32), 0.1))
    made.close()
    results = lines(tmp_path / "out")
    assert [Path(r["path"]).name for r in results] == [Path(n).name for n in names]
    pictures = [r["picture"] for r in results]
    assert len({p.casefold() for p in pictures}) == len(names)  # also where case does not count
    assert not set('<>:"/\\|?*') & set("".join(pictures))
    assert "with space.png" in pictures
    assert "瓶子.png" in pictures
    for result in results:
        assert (tmp_path / "out" / result["picture"]).is_file()
        assert Path(result["map"]).stem == Path(result["picture"]).stem


def test_the_picture_names_its_file(tmp_path, monkeypatch):
    import utils.predictions

    titles = []

    def panel(*args, **keywords):
        titles.append(args[5])
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(utils.predictions, "panel", panel)
    made = writer(tmp_path / "out")
    made.add(photo(save(tmp_path / "瓶 1.png")), Found(np.zeros((8, 8), np.float32), 0.1))
    assert titles == ["瓶 1.png\nNormal  score 0.100  threshold 0.500"]


def test_without_pictures(tmp_path):
    made = writer(tmp_path / "out", pictures=False)
    made.add(photo(save(tmp_path / "a.png")), Found(np.zeros((8, 8), np.float32), 0.1))
    made.close()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]


def test_images_are_not_overwritten_by_their_pictures(tmp_path):
    image = save(tmp_path / "in/a.png")
    assert chosen_output(tmp_path / "out", [image]) == tmp_path / "out"
    with pytest.raises(UserError, match="give another --output"):
        chosen_output(tmp_path / "out/../in", [image])
    with pytest.raises(UserError, match="is a file"):
        chosen_output(image, [image])


def test_results_of_tiles(tmp_path):
    """The finished NFA map decides as one from evidence would; what `about` says is stored."""
    threshold = Threshold(0.0, "nfa", measured_rate=0.0, normals=3)
    made = PredictionWriter(tmp_path / "out", threshold, threshold, (0.0, 1.0), maps=True)
    anomaly_map = np.linspace(0, 1, 40 * 120, dtype=np.float32).reshape(40, 120)
    nfa_map = np.full((40, 120), -2.0, np.float32)
    nfa_map[5:9, 20:30] = 3.5
    about = {"tile": [32, 32], "overlap": 0.25, "tiles": 10}
    image = Original(tmp_path / "a.png", np.zeros((40, 120, 3), np.uint8))
    made.add(image, Found(anomaly_map, 0.3, nfa=(nfa_map, 3.75), about=about))
    made.close()
    (stored,) = lines(tmp_path / "out")
    assert (stored["log_nfa"], stored["verdict"]) == (-3.75, "Anomaly")
    assert {key: stored[key] for key in about} == about
    (region,) = stored["regions"]
    assert [region[key] for key in ("x", "y", "w", "h", "peak")] == [20, 5, 10, 4, 3.5]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / stored["map"]), anomaly_map)


def test_whole_images_are_judged_in_batches(tmp_path):
    paths = [save(tmp_path / f"{i}.png") for i in range(3)]
    given = []

    def network(images: np.ndarray) -> Output:
        given.append(images.shape)
        nll = np.full(len(images), 0.5)
        return Output(images[:, 0], np.arange(len(images)), [images[:, 1], images[:, 2]], nll)

    found = list(whole_images(network, PhotoReader((16, 24), "pil"), paths, 2))
    assert given == [(2, 3, 16, 24), (1, 3, 16, 24)]
    assert [photo.path for photo, _ in found] == paths
    assert [judged.score for _, judged in found] == [0, 1, 0]
    for _, judged in found:
        assert judged.anomaly_map.shape == (16, 24)
        assert [level.shape for level in judged.evidence] == [(16, 24)] * 2
        assert judged.nfa is None
        assert judged.nll == 0.5


def test_pictures_of_large_images_are_smaller(tmp_path, monkeypatch):
    """No side is longer than the limit, the smallest region is still drawn; maps stay whole."""
    monkeypatch.setattr("utils.predictions.LONGEST_SIDE", 300)
    made = PredictionWriter(tmp_path / "out", fixed(0.5), fixed(0.6), (0.0, 1.0), maps=True)
    hot = np.zeros((1200, 900), np.float32)
    hot[1000:1003, 600:603] = 0.9
    image = Original(tmp_path / "a.png", np.zeros((1200, 900, 3), np.uint8))
    result = made.add(image, Found(hot, 0.75), truth=hot > 0)
    (region,) = result["regions"]
    assert (region["x"], region["y"], region["w"], region["h"]) == (600, 1000, 3, 3)
    assert np.load(tmp_path / "out" / result["map"]).shape == (1200, 900)
    overlay = read_image(tmp_path / "out" / result["overlay"])
    assert overlay.shape == (300, 225, 3)
    rows, columns = np.nonzero((overlay == PREDICTED).all(axis=2))
    assert 248 <= rows.min() <= rows.max() <= 252
    assert 148 <= columns.min() <= columns.max() <= 152
    picture = read_image(tmp_path / "out" / result["picture"])
    assert (picture == TRUTH).all(axis=2).any()


def test_an_nll_that_overflows_is_null_and_counts_as_drift(tmp_path):
    drift = Drift(NormalNll(1.0, 0.1, 20))
    cut = fixed(0.5)
    made = PredictionWriter(tmp_path / "o", cut, cut, (0.0, 1.0), pictures=False, drift=drift)
    for value in (float("inf"), float("nan"), 1.0):
        made.add(
            photo(save(tmp_path / "a.png")), Found(np.zeros((8, 8), np.float32), 0.1, nll=value)
        )
    made.close()
    lines = (tmp_path / "o/results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["nll"] for line in lines] == [None, None, 1.0]
    assert drift.mean == float("inf")
