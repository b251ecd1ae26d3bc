"""Extraction: the arrays are the backbone's maps of the images, and a run can train from them."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

import extract_features
import train
from datasets import extracted
from datasets.folder import find_category
from datasets.transforms import load_pixels
from engine import checkpoint, session
from engine.inputs import feature_guard
from models.backbones import weights
from tests.small_run import DEFECTS, PRESET, REPO, TINY, arguments, script, tiny_config, train_tiny
from utils.config import Config, load
from utils.errors import UserError
from utils.image import to_unit


def command(data: Path, out: Path, *more: str, preset: str = PRESET) -> list[str]:
    options = [text for setting in TINY for text in ("-o", setting)]
    return [
        "-cfg", str(REPO / f"configs/{preset}.yaml"), "--data", str(data), "--output", str(out),
        "--device", "cpu", *options, *more,
    ]  # fmt: skip


def extract(data: Path, out: Path, *more: str, preset: str = PRESET) -> None:
    assert extract_features.main(command(data, out, *more, preset=preset)) == 0


def guard(config: Config) -> dict:
    _, backbone = session.new_detector(config, allow_random=True)
    return feature_guard(config, backbone["sha256"])


@pytest.fixture(scope="module")
def features(data, tmp_path_factory) -> Path:
    """Extract the features of the tiny set."""
    out = tmp_path_factory.mktemp("features")
    extract(data, out, "--batch_size", "3")
    return out


def test_arrays_are_what_the_backbone_gives(data, features):
    config = tiny_config()
    found = extracted.read(features, "bottle", guard(config))
    category = find_category(data, "bottle")
    detector, _ = session.new_detector(config, allow_random=False)
    for records, levels in ((category.train, found.train), (category.test, found.test)):
        with paddle.no_grad():
            maps = detector.features(paddle.to_tensor(to_unit(load_pixels(records, (64, 64)))))
        for level, expected in zip(levels, maps, strict=True):
            np.testing.assert_allclose(level, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert len(found.train[0]) == 8
    assert found.paths == [str(record.path) for record in category.test]
    kinds = ["good", *DEFECTS]  # these are sorted
    assert [kinds[label] for label in found.labels] == found.defects
    assert found.labels.tolist() == [kinds.index(Path(path).parent.name) for path in found.paths]
    assert np.bincount(found.labels).tolist() == [3, 2, 2, 2]


def test_what_is_said(data, tmp_path, capsys):
    extract(data, tmp_path / "f")
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "f/bottle"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    assert lines[0].startswith(f"[bottle] MVTec AD layout in {data / 'bottle'}: 8 train, 9 test (6")
    assert lines[1] == f"[bottle] 8 training and 9 test images: {size:.1f} MB in {folder}"
    words = shlex.split(lines[2])  # paths may have spaces
    assert words[-3].endswith(f"{PRESET}.yaml")
    assert words[-2:] == ["-o", f"data.features={tmp_path / 'f'}"]
    assert len(lines) == 3


def test_training_from_them_is_training_from_the_images(data, features, tmp_path):
    train_tiny(data, tmp_path / "images")
    train_tiny(tmp_path / "no such folder", tmp_path / "arrays", "-o", f"data.features={features}")
    runs = [
        checkpoint.open_run(tmp_path / f"{kind}/bottle", "last") for kind in ("images", "arrays")
    ]
    first, second = (run.meta["progress"]["loss"] for run in runs)
    assert first == pytest.approx(second, rel=1e-4)


def test_training_with_another_configuration_is_refused(data, features, tmp_path):
    common = arguments(data, tmp_path / "exp", "-o", f"data.features={features}")
    with pytest.raises(UserError) as caught:
        train.main([*common, "-o", "model.input_size=96"])
    assert str(caught.value) == (
        f"{features / 'bottle/bottle.json'}: features were extracted with model.input_size "
        "[64, 64], the config has [96, 96]; extract again (extract_features.py) or change the "
        "config"
    )
    with pytest.raises(UserError, match=r"data\.resize pil, the config has cv2"):
        train.main([*common, "-o", "data.resize=cv2"])


def test_a_configuration_that_trains_from_features(data, tmp_path):
    """It may be used for extraction as it is; the images are read all the same."""
    extract(data, tmp_path / "f", "-o", f"data.features={tmp_path / 'none'}")
    assert extracted.names(tmp_path / "f") == ["bottle"]


def test_several_categories_and_aliases(data, tmp_path, capsys):
    for name in ("metal_nut", "zzz"):
        shutil.copytree(data / "bottle", tmp_path / f"data/{name}")
    extract(tmp_path / "data", tmp_path / "one", "-cat", "Metal Nut")
    assert extracted.names(tmp_path / "one") == ["metal_nut"]
    extract(tmp_path / "data", tmp_path / "all", "-cat", "all")
    assert extracted.names(tmp_path / "all") == ["metal_nut", "zzz"]


def test_what_is_left_out_is_said(data, tmp_path, capsys):
    shutil.copytree(data / "bottle", tmp_path / "data/bottle")
    bottle = tmp_path / "data/bottle"
    for folder in ("train/masks", "train/scratched"):
        shutil.copytree(bottle / "test/broken_large", bottle / folder)
    shutil.copy(bottle / "test/good/000.png", bottle / "test/loose.png")
    extract(tmp_path / "data", tmp_path / "f", "-o", "data.rotation=5")
    out = capsys.readouterr().out
    assert "[bottle] left out: folders in train/ that are not used: masks, scratched" in out
    assert "9 test (6 defective), masks for 6, 1 unlabelled" in out
    assert "[bottle] data.rotation is left out: features cannot be turned" in out
    assert "8 training and 9 test images" in out


def test_a_category_without_training_images(data, tmp_path):
    shutil.copytree(data / "bottle/test", tmp_path / "data/bottle/test")
    with pytest.raises(UserError, match=r"bottle: no training images; put normal ones in train/"):
        extract(tmp_path / "data", tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_images_are_not_replaced(data):
    with pytest.raises(UserError, match="bottle: holds ground_truth, test, train, which extract"):
        extract(data, data)
    assert len(list((data / "bottle/train/good").iterdir())) == 8


def test_a_damaged_image_leaves_nothing(data, tmp_path):
    shutil.copytree(data / "bottle", tmp_path / "data/bottle")
    (tmp_path / "data/bottle/test/good/001.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"001\.png: cannot read this image"):
        extract(tmp_path / "data", tmp_path / "f")
    assert list((tmp_path / "f").iterdir()) == []


def test_three_sizes_of_the_image(data, tmp_path):
    """What CS-Flow sees; features of another flow's configuration do not pass for it."""
    preset = REPO / "configs/csflow_efficientnet_lite0.yaml"
    overrides = ["model.input_size=128", "model.hidden=8", "model.blocks=1"]
    options = [text for each in overrides for text in ("-o", each)]
    args = ["-cfg", str(preset), "--data", str(data), "--output", str(tmp_path), *options]
    assert extract_features.main([*args, "--device", "cpu"]) == 0
    found = extracted.read(tmp_path, "bottle", guard(load(preset, overrides)))
    for part in (found.train, found.test):
        assert [level.shape[2:] for level in part] == [(4, 4), (2, 2), (1, 1)]
    one_size = tiny_config("model.input_size=128", "model.strides=[32]", "model.last_block=14")
    with pytest.raises(UserError, match=r"features were extracted with model\.scales 3"):
        extracted.read(tmp_path, "bottle", guard(one_size))


def test_weights_are_asked_for(data, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("FLOWAD_WEIGHTS_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "*")
    preset = "fastflow_resnet18"
    with pytest.raises(UserError, match="no weights for backbone resnet18"):
        extract(data, tmp_path / "f", preset=preset)
    extract(data, tmp_path / "f", "--allow-random-backbone", preset=preset)
    found = extracted.read(tmp_path / "f", "bottle", guard(tiny_config(preset=preset)))
    assert found.about["guard"]["model.backbone"] == "resnet18"


@pytest.mark.slow
def test_the_script(data, tmp_path):
    done = script("extract_features.py", *command(data, tmp_path), "-cat", "pill")
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "no category 'pill' (found: bottle)" in line
