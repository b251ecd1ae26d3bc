"""Prediction: files, folders and patterns; pictures and results of all kinds of images."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageSequence

import predict
from engine import session
from models import fast_backbone
from models.flows import onednn
from tests.small_run import REPO, copy_bottle, script, train_tiny
from utils.errors import UserError

LINE = re.compile(r"^(Normal|Anomaly) - score:  (-?\d+\.\d{3})(?:  (.+))?$", re.M)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of images with difficult names."""
    folder = tmp_path / "my photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("what?.png", "a b.png", "瓶子.PNG", "[x].png", "sub/a b.png"):
        shutil.copy(REPO / "images/bottle_good.png", folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(exp: Path, images: Path | str, out: Path, *more: str) -> list[dict]:
    args = ["--exp_dir", str(exp), "--image_path", str(images), "--output", str(out)]
    assert predict.main([*args, *more]) == 0
    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_one_file(exp, tmp_path, capsys):
    (found,) = predicted(exp, REPO / "images/bottle_bad.png", tmp_path / "o")
    out = capsys.readouterr().out
    ((verdict, score, path),) = LINE.findall(out)
    assert path == ""
    assert verdict == found["verdict"]
    assert score == f"{found['score']:.3f}"
    assert out.startswith("image threshold ")  # which one decides, and where it comes from
    assert (tmp_path / "o" / found["picture"]).is_file()


def test_fields_of_a_result(exp, tmp_path):
    (found,) = predicted(exp, REPO / "images/bottle_bad.png", tmp_path / "o", "--save_maps")
    assert set(found) >= {
        "path", "score", "threshold", "verdict", "pixel_threshold", "map_mean", "map_max",
        "regions", "picture", "map",
    }  # fmt: skip
    _, _, stored = session.open_detector(str(exp), "bottle", "best")
    assert stored is not None
    assert found["threshold"] == stored.image.value
    assert found["pixel_threshold"] == stored.pixel.value
    assert (found["verdict"] == "Anomaly") == (found["score"] > stored.image.value)
    for region in found["regions"]:
        assert set(region) == {"x", "y", "w", "h", "area", "peak"}
        assert region["peak"] > stored.pixel.value


def test_a_folder(exp, photos, tmp_path, capsys):
    found = predicted(exp, photos, tmp_path / "o", "--batch_size", "2")
    names = [str(Path(each["path"]).relative_to(photos)) for each in found]
    assert sorted(names) == sorted(["what?.png", "a b.png", "瓶子.PNG", "[x].png", "sub/a b.png"])
    assert [path for _, _, path in LINE.findall(capsys.readouterr().out)] == [
        each["path"] for each in found
    ]
    assert len({each["picture"] for each in found}) == 5
    assert all((tmp_path / "o" / each["picture"]).is_file() for each in found)
    assert len({round(each["score"], 6) for each in found}) == 1  # the same picture five times


@pytest.mark.skipif(not onednn.is_usable(), reason="oneDNN is not to be had here")
def test_many_images_go_through_the_fast_backbone(exp, photos, tmp_path, monkeypatch):
    plain = predicted(exp, photos, tmp_path / "plain")
    made = []
    start = fast_backbone.FastBackbone._start

    def started(self, images):
        start(self, images)
        made.append(self._predictor)

    monkeypatch.setattr(fast_backbone, "WORTHWHILE", 3)
    monkeypatch.setattr(fast_backbone.FastBackbone, "_start", started)
    fast = predicted(exp, photos, tmp_path / "fast", "--batch_size", "2")
    assert len(made) == 1
    assert made[0] is not None
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["verdict"] == theirs["verdict"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("*.png", 3), ("*", 4), ("**/a*.png", 2), ("what?.png", 1), ("[x].png", 1)],
)
def test_patterns(exp, photos, tmp_path, pattern, count):
    assert len(predicted(exp, photos / pattern, tmp_path / "o")) == count


def test_pictures_go_to_the_run_unless_told(exp, photos):
    assert predict.main(["--exp_dir", str(exp), "--image_path", str(photos / "a b.png")]) == 0
    assert (exp / "bottle/predictions/a b.png").is_file()


def test_other_geometries(exp, tmp_path):
    """Non-square, grey, 16-bit and rotated images keep their own geometry in maps and regions."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 200), dtype=np.uint8)
    (folder / "grey.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    deep = rng.integers(0, 65536, (90, 30), dtype=np.uint16)
    (folder / "deep.tiff").write_bytes(cv2.imencode(".tiff", deep)[1].tobytes())
    rotated = Image.fromarray(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    rotated.save(folder / "rotated.jpg", exif=exif)
    sizes = {"grey": (40, 200), "deep": (90, 30), "rotated": (80, 50)}
    found = predicted(exp, folder, tmp_path / "o", "--save_maps", "--pixel_threshold=-1e9")
    assert len(found) == 3
    for each in found:
        height, width = sizes[Path(each["path"]).stem]
        assert np.load(tmp_path / "o" / each["map"]).shape == (height, width)
        (region,) = each["regions"]  # everything is above that threshold
        assert (region["x"], region["y"], region["w"], region["h"]) == (0, 0, width, height)
        assert region["area"] == height * width


def test_the_map_lies_over_the_defect(exp, data, tmp_path):
    """A bright square pasted into a good image raises the map where it was pasted."""
    with Image.open(REPO / "images/bottle_good.png") as image:
        pixels = np.array(image.convert("RGB"))
    pixels = np.ascontiguousarray(pixels[:, : pixels.shape[1] * 3 // 4])  # not square
    height, width = pixels.shape[:2]
    y, x = height // 8, width * 5 // 8
    plain = tmp_path / "plain.png"
    Image.fromarray(pixels).save(plain)
    pixels[y : y + 50, x : x + 50] = (255, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "pasted.png")
    maps = []
    for name in ("plain", "pasted"):
        (found,) = predicted(exp, tmp_path / f"{name}.png", tmp_path / name, "--save_maps")
        maps.append(np.load(tmp_path / name / found["map"]))
    row, column = np.unravel_index(np.argmax(maps[1] - maps[0]), (height, width))
    assert abs(row - (y + 25)) < 40
    assert abs(column - (x + 25)) < 40


def test_ground_truth_is_shown_where_it_is_known(exp, data, tmp_path):
    known, _ = (predicted(exp, data / f"bottle/test/{f}/000.png", tmp_path / f)[0]
                for f in ("broken_large", "good"))  # fmt: skip
    pictures = {f: Image.open(tmp_path / f / "000.png").size for f in ("broken_large", "good")}
    assert Path(known["path"]).parent.name == "broken_large"
    assert pictures["broken_large"][0] > pictures["good"][0]  # a third tile


def test_thresholds_of_the_command_line(exp, photos, tmp_path):
    image = photos / "a b.png"
    (high,) = predicted(exp, image, tmp_path / "o", "--image_threshold", "1e6")
    (low,) = predicted(exp, image, tmp_path / "o", "--image_threshold=-1e6")
    assert (high["verdict"], high["threshold"]) == ("Normal", 1e6)
    assert (low["verdict"], low["threshold"]) == ("Anomaly", -1e6)
    assert high["score"] == low["score"]
    (score,) = predicted(exp, image, tmp_path / "o", "--image_threshold", repr(high["score"]))
    assert score["verdict"] == "Normal"  # a tie


def uncalibrated(exp: Path, target: Path) -> Path:
    shutil.copytree(exp, target)
    for file in target.glob("bottle/*/meta.json"):
        meta = json.loads(file.read_text(encoding="utf-8"))
        del meta["calibration"]
        file.write_text(json.dumps(meta))
    return target


@pytest.mark.parametrize("pixel", ["0.5", "0", "-0.5"])
def test_a_run_without_thresholds_needs_them_given(exp, photos, tmp_path, pixel):
    bare, image = uncalibrated(exp, tmp_path / "bare"), photos / "a b.png"
    with pytest.raises(UserError, match="give --image_threshold"):
        predicted(bare, image, tmp_path / "o")
    given = ("--image_threshold", "0.5", "--pixel_threshold", pixel)
    (found,) = predicted(bare, image, tmp_path / "o", *given)
    assert (tmp_path / "o" / found["picture"]).is_file()


def test_an_unreadable_image_alone_is_an_error(exp, tmp_path):
    (tmp_path / "x.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"x\.png: cannot read this image"):
        predicted(exp, tmp_path / "x.png", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_an_unreadable_image_is_one_line_and_exit_code_2(exp, tmp_path):
    (tmp_path / "x.png").write_bytes(b"broken")
    done = script("predict.py", "--exp_dir", str(exp), "--image_path", str(tmp_path / "x.png"))
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "x.png: cannot read this image" in line
    assert "Traceback" not in done.stderr


def test_unreadable_images_in_a_folder_are_skipped_and_counted(exp, photos, tmp_path, capsys):
    for name in ("bad 1.png", "bad 2.jpg"):
        (photos / name).write_bytes(b"broken")
    assert len(predicted(exp, photos, tmp_path / "o", "--batch_size", "3")) == 5
    err = capsys.readouterr().err
    (line,) = [text for text in err.splitlines() if text.startswith("warning")]
    assert "skipped 2 unreadable image(s)" in line
    assert "bad 1.png" in line
    assert "bad 2.jpg" in line


def test_a_folder_without_a_readable_image(exp, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 2 images can be read"):
        predicted(exp, tmp_path, tmp_path / "o")
    with pytest.raises(UserError, match="no images here"):
        predicted(exp, tmp_path / "*.bmp", tmp_path / "o")


def test_images_are_not_overwritten(exp, photos):
    before = (photos / "a b.png").read_bytes()
    with pytest.raises(UserError, match="holds the images themselves"):
        predicted(exp, photos, photos)
    assert (photos / "a b.png").read_bytes() == before
    assert not (photos / "results.jsonl").exists()


def test_batch_sizes(exp, data, tmp_path):
    test = data / "bottle/test"
    one, five = (
        {f["path"]: f["score"] for f in predicted(exp, test, tmp_path / n, "--batch_size", n)}
        for n in ("1", "5")
    )
    assert one == pytest.approx(five, rel=1e-6)


def test_best_and_last_are_different_files(exp, photos, tmp_path):
    """`--is_last` reads the other checkpoint."""
    copy = tmp_path / "exp"
    shutil.copytree(exp, copy)
    (copy / "bottle/best/head.safetensors").write_bytes(b"broken")
    image = photos / "a b.png"
    assert predicted(copy, image, tmp_path / "o", "--is_last")
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        predicted(copy, image, tmp_path / "o")


def test_the_category_may_be_spelled_in_any_way(data, tmp_path, photos):
    shutil.copytree(data / "bottle", tmp_path / "data/metal_nut")
    exp = tmp_path / "exp"
    train_tiny(tmp_path / "data", exp, "-cat", "Metal Nut", "--epochs", "1")
    assert (exp / "metal_nut/last").is_dir()
    assert predicted(exp, photos / "a b.png", tmp_path / "o", "-cat", "metal nut")


def test_a_folder_of_good_images_gets_a_name(data, tmp_path, photos):
    """A category may be one's own folder; -cat names it in the results."""
    exp = tmp_path / "exp"
    train_tiny(data / "bottle/train/good", exp, "-cat", "my product", "--epochs", "1")
    assert predicted(exp, photos / "a b.png", tmp_path / "o")
    assert (exp / "my product/last").is_dir()


def test_a_moving_picture(exp, data, tmp_path, capsys):
    """Pictures of all images, of normal and defective ones, in the order of the console."""
    out = tmp_path / "o"
    found = predicted(exp, data / "bottle/test", out, "--gif")
    sizes = [Image.open(out / each["picture"]).size for each in found]
    assert len(set(sizes)) == 2  # with ground truth and without
    with Image.open(out / "bottle.gif") as gif:
        assert sum(1 for _ in ImageSequence.Iterator(gif)) == len(found) == 9
        assert gif.size == tuple(np.max(sizes, axis=0))
        for number, each in enumerate(found):
            gif.seek(number)
            assert gif.info["duration"] == 1000
            frame = np.array(gif.convert("RGB")).astype(int)
            picture = np.array(Image.open(out / each["picture"]).convert("RGB"))
            assert np.abs(frame[:, : picture.shape[1]] - picture).mean() < 6
    assert f"9 of 9 pictures in {out / 'bottle.gif'}" in capsys.readouterr().out
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_no_moving_picture_unless_asked(exp, photos, tmp_path):
    predicted(exp, photos / "a b.png", tmp_path / "o", "--gif", "false")
    assert not list((tmp_path / "o").glob("*.gif"))


def test_a_moving_picture_of_many_images(exp, photos, tmp_path, capsys):
    for number in range(43):
        shutil.copy(photos / "a b.png", photos / f"{number:02}.png")
    (photos / "00.png").write_bytes(b"broken")
    found = predicted(exp, photos, tmp_path / "o", "--gif", "--batch_size", "16")
    assert len(found) == 47
    with Image.open(tmp_path / "o/bottle.gif") as gif:
        assert sum(1 for _ in ImageSequence.Iterator(gif)) == 40
    assert "40 of 47 pictures in" in capsys.readouterr().out


# --- tiles


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A large image, for tiles of 160: 12 windows with the usual overlap, 2 × 3 without."""
    with Image.open(REPO / "images/bottle_good.png") as image:
        bottle = np.array(image.convert("RGB"))
    path = tmp_path_factory.mktemp("scan") / "scan.png"
    Image.fromarray(np.hstack([bottle, bottle[:, :160]])).save(path)
    return path


def test_the_score_of_an_image_is_that_of_its_worst_tile(exp, scan, tmp_path, capsys):
    """Every tile is what it would be as an image of its own; their maps lie side by side."""
    options = ("--tile", "160", "--overlap", "0", "--save_maps")
    (found,) = predicted(exp, scan, tmp_path / "o", *options)
    err = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in err if line.startswith("warning")]
    assert "applies per tile" in warning
    assert (found["tile"], found["overlap"], found["tiles"]) == ([160, 160], 0.0, 6)
    (tmp_path / "tiles").mkdir()
    with Image.open(scan) as image:
        places = [(x, y) for y in (0, 160) for x in (0, 160, 320)]
        for number, (x, y) in enumerate(places):
            image.crop((x, y, x + 160, y + 160)).save(tmp_path / f"tiles/{number}.png")
    alone = predicted(exp, tmp_path / "tiles", tmp_path / "p", "--save_maps")
    assert found["score"] == pytest.approx(max(each["score"] for each in alone), rel=1e-5)
    whole = np.load(tmp_path / "o" / found["map"])
    assert whole.shape == (320, 480)
    for each, (x, y) in zip(alone, places, strict=True):
        part = np.load(tmp_path / "p" / each["map"])
        np.testing.assert_allclose(whole[y : y + 160, x : x + 160], part, atol=1e-5)
    assert "tile" not in alone[0]


def test_batches_of_tiles(exp, scan, tmp_path):
    """Scores and maps do not depend on how many tiles the network sees at a time."""
    one, five = (
        predicted(exp, scan, tmp_path / n, "--tile", "160", "--batch_size", n)[0]
        for n in ("1", "5")
    )
    assert one["tiles"] == five["tiles"] == 12
    assert one["overlap"] == 0.25
    for key in ("score", "map_mean", "map_max"):
        assert one[key] == pytest.approx(five[key], rel=1e-5)


def test_an_image_no_larger_than_a_tile_is_predicted_as_ever(exp, photos, tmp_path):
    whole = predicted(exp, photos, tmp_path / "o", "--save_maps", "--batch_size", "1")
    tiled = predicted(exp, photos, tmp_path / "t", "--save_maps", "--tile", "400x500")
    for ours, theirs in zip(tiled, whole, strict=True):
        assert ours["tile"] == [400, 500]
        assert ours["tiles"] == 1
        assert {key: ours[key] for key in theirs if "map_" not in key} == {
            key: value for key, value in theirs.items() if "map_" not in key
        }
        maps = [np.load(tmp_path / f / each["map"]) for f, each in (("t", ours), ("o", theirs))]
        np.testing.assert_array_equal(*maps)
        pictures = [(tmp_path / f / ours["overlay"]).read_bytes() for f in ("t", "o")]
        assert pictures[0] == pictures[1]


def test_a_defect_in_one_tile_is_found_where_it_is(exp, scan, tmp_path):
    with Image.open(scan) as image:
        pixels = np.array(image)
    pixels[230:260, 400:430] = (255, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "pasted.png")
    maps = []
    for name, file in (("plain", scan), ("pasted", tmp_path / "pasted.png")):
        options = ("--tile", "160", "--save_maps")
        (found,) = predicted(exp, file, tmp_path / name, *options)
        maps.append(np.load(tmp_path / name / found["map"]))
    row, column = np.unravel_index(np.argmax(maps[1] - maps[0]), maps[0].shape)
    assert abs(row - 245) < 25
    assert abs(column - 415) < 25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--overlap", "0.25"), "has no effect without --tile"),
        (("--tile", "16"), "at least 32 pixels"),
        (("--tile", "64", "--overlap", "0.95"), "must be a share of the tile"),
    ],
)
def test_mistakes_with_tiles_are_found_before_anything_is_read(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        predict.main(["--exp_dir", "none", "--image_path", str(tmp_path / "none.png"), *flags])


def test_large_scans_are_read(exp, scan, tmp_path, monkeypatch):
    """What Pillow takes for a decompression bomb is what tiles are for."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        predicted(exp, scan, tmp_path / "o")
    assert predicted(exp, scan, tmp_path / "o", "--tile", "320")


def test_nfa_of_an_image_counts_its_tiles(data, scan, tmp_path, capsys):
    """U-Flow's test decides: ten equal tiles have ten times the NFA of one."""
    exp = tmp_path / "exp"
    uflow = ("-cfg", str(REPO / "configs/uflow_efficientnet_lite0.yaml"), "--epochs", "1")
    policies = ("-o", "eval.image_threshold=nfa", "-o", "eval.pixel_threshold=nfa")
    train_tiny(data, exp, *uflow, *policies)
    with Image.open(scan) as image:
        image.crop((0, 0, 160, 160)).save(tmp_path / "tile.png")
        pixels = np.tile(np.array(image.crop((0, 0, 160, 160))), (1, 10, 1))
    Image.fromarray(pixels).save(tmp_path / "ten.png")
    options = ("--tile", "160", "--overlap", "0")
    (alone,) = predicted(exp, tmp_path / "tile.png", tmp_path / "a")
    capsys.readouterr()
    (ten,) = predicted(exp, tmp_path / "ten.png", tmp_path / "t", *options)
    assert "the NFA of an image counts all of its tiles" in capsys.readouterr().err
    assert ten["tiles"] == 10
    assert ten["log_nfa"] == pytest.approx(alone["log_nfa"] + 1, abs=1e-3)
    assert ten["score"] == pytest.approx(alone["score"], rel=1e-5)
    assert (ten["verdict"] == "Anomaly") == (ten["log_nfa"] < 0) == bool(ten["regions"])


def changed(folder: Path, change) -> Path:
    """Write the good images of lite_data's bottle, changed."""
    folder.mkdir()
    for file in sorted((REPO / "lite_data/bottle/train/good").iterdir())[:12]:
        pixels = change(np.asarray(Image.open(file), np.float32))
        Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8)).save(folder / file.name)
    return folder


CHANGES = {
    "none": lambda pixels: pixels,
    "brighter": lambda pixels: 1.6 * pixels + 30,
    "out of focus": lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 6),
}


@pytest.fixture(scope="module")
def watchful(tmp_path_factory) -> Path:
    """Train a little on more images than the other tests need."""
    root = copy_bottle(tmp_path_factory.mktemp("watchful"), train=32)
    return train_tiny(root, root / "exp", "--epochs", "8").parent


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_camera_gives_an_alarm(watchful, tmp_path, capsys, name):
    found = predicted(watchful, changed(tmp_path / "i", CHANGES[name]), tmp_path / "o")
    out, err = capsys.readouterr()
    (line,) = re.findall(
        r"^drift: z = (\S+) over the last 12 images \(alarm beyond (\S+)\)", out, re.M
    )
    assert ("warning: most of these images differ" in err) == (name != "none")
    assert (abs(float(line[0])) > float(line[1])) == (name != "none")
    assert all(np.isfinite(each["nll"]) for each in found)


def test_nothing_is_said_of_a_few_images(exp, photos, tmp_path, capsys):
    predicted(exp, photos, tmp_path / "o")
    assert "drift" not in capsys.readouterr().out


def test_a_drift_window_that_is_too_small(exp, photos, tmp_path):
    with pytest.raises(UserError, match="--drift_window 3: must be at least 10 images"):
        predicted(exp, photos, tmp_path / "o", "--drift_window", "3")
