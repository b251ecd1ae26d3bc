"""What a run trains on: the data set's own validation images, names from folders, one digest."""

import json
import shutil
from pathlib import Path

import pytest

import eval as evaluation
import extract_features
from datasets.folder import find_category
from engine import checkpoint, session
from engine.inputs import find_trainable, training_inputs
from tests.small_run import arguments, copy_bottle, tiny_config, train_tiny
from utils.config import override
from utils.errors import UserError


@pytest.fixture(scope="module")
def ad2(tmp_path_factory) -> Path:
    """Arrange a few images of bottle as MVTec AD 2 has them: 6 train, 2 validation, 3 + 2 test."""
    root = tmp_path_factory.mktemp("ad2")
    bottle = copy_bottle(root, train=8, good=3, defective=2) / "bottle"
    (bottle / "validation/good").mkdir(parents=True)
    (bottle / "test_public/ground_truth").mkdir(parents=True)
    for file in sorted((bottle / "train/good").iterdir())[6:]:
        file.rename(bottle / "validation/good" / file.name)
    (bottle / "test/good").rename(bottle / "test_public/good")
    (bottle / "test/broken_large").rename(bottle / "test_public/bad")
    (bottle / "ground_truth/broken_large").rename(bottle / "test_public/ground_truth/bad")
    (bottle / "test/contamination").rename(bottle / "test_private")
    for name in ("test", "ground_truth"):
        shutil.rmtree(bottle / name)
    return root


@pytest.fixture(scope="module")
def ad2_run(ad2, tmp_path_factory) -> Path:
    exp = tmp_path_factory.mktemp("runs") / "ad2"
    train_tiny(ad2, exp)
    return exp


def test_validation_images_are_held_out(ad2, ad2_run):
    said = (ad2_run / "bottle/train.log").read_text(encoding="utf-8")
    assert (
        f"[bottle] MVTec AD 2 layout in {ad2 / 'bottle'}: 6 train, 2 validation, 5 test (2 "
        "defective), masks for 2, 2 unlabelled"
    ) in said
    assert (
        "[bottle] 6 images to train on, 2 held out (the data set's validation images), 5 to test"
    ) in said
    stored = checkpoint.open_run(ad2_run / "bottle", "best")
    assert stored.meta["calibration"]["image"]["normals"] == 2
    _, detector, _ = session.open_detector(str(ad2_run), "bottle", "best")
    category = find_category(ad2, "bottle")
    for seed in (0, 1):  # nothing about the split is random
        config = override(stored.config, [f"train.seed={seed}", "data.cache=false"])
        data = training_inputs(config, category, detector, stored.meta["backbone"]["sha256"])
        assert (data.train, data.holdout, data.validation) == (6, 2, True)
        assert data.digest == stored.meta["data"]["digest"]


def test_unlabelled_images_are_never_evaluated(ad2, ad2_run, capsys):
    args = ["--exp_dir", str(ad2_run), "--data", str(ad2), "-o", "data.layout=mvtec2"]
    assert evaluation.main(args) == 0
    (row,) = json.loads((ad2_run / "bottle/results.json").read_text(encoding="utf-8"))["rows"]
    assert [Path(image["path"]).parts[-3:-1] for image in row["images"]] == [
        *[("test_public", "bad")] * 2, *[("test_public", "good")] * 3,
    ]  # fmt: skip
    assert f"[bottle] MVTec AD 2 layout in {ad2 / 'bottle'}: " in capsys.readouterr().out


def test_validation_images_are_extracted_too(ad2, ad2_run, tmp_path):
    """A run from extracted features holds out the same images as one that reads them."""
    options = [*arguments(ad2, tmp_path / "exp"), "--overwrite"]
    tiny = [text for text in options if text not in ("--overwrite", "--epochs", "2")]
    tiny[tiny.index("--exp_dir")] = "--output"
    assert extract_features.main(tiny) == 0
    run = train_tiny(ad2, tmp_path / "run", "-o", f"data.features={tmp_path / 'exp'}")
    said = (run / "train.log").read_text(encoding="utf-8")
    assert "6 images to train on, 2 held out (the data set's validation images), 5 to test" in said
    ours, theirs = (checkpoint.open_run(r, "last") for r in (run, ad2_run / "bottle"))
    values = [c.meta["calibration"]["image"]["value"] for c in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_category_with_validation_but_nothing_to_train_on(ad2, tmp_path):
    shutil.copytree(ad2 / "bottle", tmp_path / "bottle")
    shutil.rmtree(tmp_path / "bottle/train")
    with pytest.raises(UserError, match=r"bottle: 0 training image\(s\): at least 2 are needed"):
        train_tiny(tmp_path, tmp_path / "exp")


def test_what_is_trained_on_does_not_depend_on_the_name_of_the_layout(data):
    config = tiny_config(f"data.root={data}")
    detector, info = session.new_detector(config, allow_random=False)
    digests = set()
    for layout in ("auto", "mvtec", "mpdd", "folder"):
        named = override(config, [f"data.layout={layout}"])
        (category,) = find_trainable(named, ["bottle"])
        digests.add(training_inputs(named, category, detector, info["sha256"]).digest)
    assert len(digests) == 1


def test_the_layout_may_change_afterwards(tmp_path):
    config = tiny_config("data.layout=visa")
    changed = session.evaluation_config(config, ["data.layout=folder"])
    assert changed.data.layout == "folder"
    found = checkpoint.Checkpoint(tmp_path, config, {})
    checkpoint.check_same_run(found, changed)


def names(root: Path, *wanted: str, layout: str = "auto") -> list[str]:
    config = tiny_config(f"data.root={root}", f"data.layout={layout}")
    return [category.name for category in find_trainable(config, wanted)]


def test_which_categories_are_trained(data, tmp_path):
    shutil.copytree(data / "bottle", tmp_path / "Steel Plate")
    shutil.copytree(data / "bottle", tmp_path / "bottle")
    assert names(tmp_path) == ["bottle"]  # the default
    assert names(tmp_path, "all") == ["bottle", "Steel Plate"]
    assert names(tmp_path, "steel_plate", "bottle") == ["Steel Plate", "bottle"]
    inside = tmp_path / "Steel Plate"
    assert names(inside) == names(inside, "all") == ["Steel Plate"]
    assert names(inside, "plate") == ["plate"]  # as the user calls it
    shutil.rmtree(tmp_path / "bottle")
    with pytest.raises(UserError, match=r"no category 'bottle' \(found: Steel Plate\)"):
        names(tmp_path)
    with pytest.raises(UserError, match=r"data\.layout is btad, so expected train/ok"):
        names(tmp_path, "steel plate", layout="btad")
