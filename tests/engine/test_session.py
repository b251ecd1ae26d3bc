"""Runs on disk, what they may be opened with, evaluation from the command line."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import eval as evaluation
from datasets.folder import find_category, split_holdout
from engine import checkpoint, session
from engine.evaluator import calibrate, score_all
from engine.inputs import image_source
from metrics.roc import rank_labelled
from tests.small_run import (
    PRESET,
    changed,
    tiny_config,
    train_tiny,
    untrained_run,
)
from utils.errors import UserError
from utils.report import COLUMNS


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def evaluated(exp: Path, data: Path, *more: str) -> dict:
    """Run eval.py in this process; return the row of bottle."""
    assert evaluation.main(["--exp_dir", str(exp), "--data", str(data), *more]) == 0
    folder = exp if "all" in more else exp / "bottle"
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"][0]


# --- folders


def test_names_and_paths_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert session.run_folder("exp", "bottle") == Path("results/exp/bottle")
    assert session.run_folder("exp") == Path("results/exp")
    assert session.run_folder("./exp", "bottle") == Path("exp/bottle")
    assert session.run_folder(str(tmp_path / "a b"), "x") == tmp_path / "a b/x"


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    """exp_<batch>_<number of runs so far>, as FastFlow-Paddle names them."""
    monkeypatch.chdir(tmp_path)
    assert session.next_exp_dir(32) == "exp_32_0"
    (tmp_path / "results/exp_32_0").mkdir(parents=True)
    (tmp_path / "results/other").mkdir()
    assert session.next_exp_dir(8) == "exp_8_2"
    (tmp_path / "results/exp_8_3").mkdir()
    assert session.next_exp_dir(8) == "exp_8_4"


def test_categories_by_any_spelling(tmp_path):
    for name in ("metal_nut", "bottle", "carpet"):
        (tmp_path / name / "last").mkdir(parents=True)
        (tmp_path / name / "last" / checkpoint.META).touch()
    (tmp_path / "predictions").mkdir()
    assert session.run_folder(str(tmp_path), "Metal Nut") == tmp_path / "metal_nut"
    assert session.run_folder(str(tmp_path), "wood") == tmp_path / "wood"
    assert session.trained_categories(str(tmp_path)) == ["carpet", "bottle", "metal_nut"]


def test_the_only_category_is_the_default(tmp_path):
    exp = str(tmp_path / "exp")
    assert session.chosen_category(exp, None) == "bottle"
    for name in ("zipper", "wood"):
        assert session.chosen_category(exp, None) == ("bottle" if name == "zipper" else "zipper")
        (tmp_path / "exp" / name / "last").mkdir(parents=True)
        (tmp_path / "exp" / name / "last" / checkpoint.META).touch()
    with pytest.raises(UserError, match="holds wood, zipper; choose one with -cat"):
        session.chosen_category(exp, None)
    assert session.chosen_category(exp, "zipper") == "zipper"


# --- opening


def test_the_best_checkpoint_is_the_default(tmp_path):
    untrained_run(tmp_path / "exp/bottle", tiny_config())
    meta_file = tmp_path / "exp/bottle/last/meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    meta["progress"]["epoch"] = 9
    meta_file.write_text(json.dumps(meta))
    exp = str(tmp_path / "exp")
    best, detector, _ = session.open_detector(exp, "bottle", "best")
    last, _, _ = session.open_detector(exp, "bottle", "last")
    assert (best.meta["progress"]["epoch"], last.meta["progress"]["epoch"]) == (1, 9)
    assert not detector.training


def test_other_backbone_weights_are_refused(tmp_path):
    untrained_run(tmp_path / "exp/bottle", tiny_config())
    meta_file = tmp_path / "exp/bottle/best/meta.json"
    text = meta_file.read_text(encoding="utf-8")
    digest = json.loads(text)["backbone"]["sha256"]
    meta_file.write_text(text.replace(digest, "f" * 64))
    with pytest.raises(UserError, match="trained on backbone weights ffffffffffff"):
        session.open_detector(str(tmp_path / "exp"), "bottle", "best")


def test_a_run_on_random_weights_can_be_opened(tmp_path):
    config = tiny_config(preset="fastflow_resnet18")
    config_random = untrained_run(tmp_path / "exp/bottle", config)
    found, detector, _ = session.open_detector(str(tmp_path / "exp"), "bottle", "best")
    if found.meta["backbone"]["origin"] != "random":
        pytest.skip("weights of resnet18 are in the cache of this machine")
    ours, theirs = (d.backbone.state_dict() for d in (detector, config_random))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), value.numpy())


def test_a_damaged_head_is_one_line(exp, data):
    head = exp / "bottle/best/head.safetensors"
    with changed(head, head.read_bytes()[:100]), pytest.raises(UserError) as caught:
        evaluated(exp, data)
    assert str(caught.value).startswith(f"{head}: cannot be read (")
    assert str(caught.value).endswith("the checkpoint is damaged")
    assert "\n" not in str(caught.value)


# --- calibration


def test_thresholds_are_those_of_the_held_out_normals(exp, data):
    found, detector, stored = session.open_detector(str(exp), "bottle", "best")
    config = found.config
    _, holdout = split_holdout(find_category(data, "bottle").train, 0.25, config.train.seed)
    source = image_source(holdout, config, detector)
    scores = score_all(detector, source, 4).scores
    assert stored is not None
    assert stored.image.value == scores.max()  # the 99th percentile of two
    assert stored.image.normals == 2
    again = calibrate(detector, source, config)
    assert stored == again


def test_test_images_have_no_say_in_thresholds(exp, own_data, tmp_path):
    for file in (own_data / "bottle/test").rglob("*.png"):
        picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        file.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    shutil.rmtree(own_data / "bottle/ground_truth")
    run = train_tiny(own_data, tmp_path / "other")
    for which in ("best", "last"):
        stored = [checkpoint.read(r / which) for r in (run, exp / "bottle")]
        assert stored[0] is not None
        assert stored[1] is not None
        assert stored[0].meta["calibration"] == stored[1].meta["calibration"]


# --- evaluation


def test_the_row_of_a_result(exp, data, capsys):
    row = evaluated(exp, data)
    assert row["category"] == "bottle"
    settings = row["settings"]
    assert settings["preset"] == PRESET
    assert settings["backbone"].startswith("efficientnet_lite0 (bundled, sha256 ")
    assert settings["input"] == "64×64"
    assert settings["eval size"] == "input"
    assert settings["checkpoint"] == "best on hold-out"
    assert settings["epoch"] in (1, 2)
    assert settings["image threshold"] == "percentile:99"
    assert settings["pixel threshold"] == "percentile:99.9"
    assert (settings["seed"], settings["runs"]) == (0, 1)
    assert {key for _, key in COLUMNS} <= set(row["metrics"])
    images = row["images"]
    assert len(images) == 9
    assert sum(image["label"] for image in images) == 6
    assert {i["defect"] for i in images} == {
        "good",
        "broken_large",
        "broken_small",
        "contamination",
    }
    expected = rank_labelled(
        np.array([i["score"] for i in images]), np.array([i["label"] for i in images]) > 0
    ).auroc()
    assert row["metrics"]["image_auroc"] == pytest.approx(expected)
    out = capsys.readouterr().out
    line = "EVAL:  image-auc : {image_auroc:.6f} pixel-auc:{pixel_auroc:.6f}"
    assert line.format(**row["metrics"]) in out.splitlines()
    assert "* uses test labels (F1-max, oracle)" in out


def test_verdicts_follow_the_stored_threshold(exp, data):
    row = evaluated(exp, data)
    _, _, stored = session.open_detector(str(exp), "bottle", "best")
    assert stored is not None
    for image in row["images"]:
        assert image["defective"] == (image["score"] > stored.image.value)
    alarms = [i["defective"] for i in row["images"] if i["label"] == 0]
    assert row["metrics"]["false_alarm_rate"] == pytest.approx(sum(alarms) / 3)


def test_last_and_best(exp, data):
    assert evaluated(exp, data, "--is_last")["settings"]["checkpoint"] == "last"
    assert evaluated(exp, data, "--is_last", "false")["settings"]["checkpoint"].startswith("best")


def test_selection_on_test_is_labelled(data, tmp_path):
    train_tiny(data, tmp_path / "exp", "--select-on", "test", "--epochs", "1")
    assert evaluated(tmp_path / "exp", data)["settings"]["checkpoint"] == "best on test"
    last = evaluated(tmp_path / "exp", data, "--is_last")
    assert last["settings"]["checkpoint"] == "last"


def test_evaluation_sizes(exp, data):
    rows = {s: evaluated(exp, data, "--eval-size", s) for s in ("input", "256", "original")}
    for size, row in rows.items():
        assert row["settings"]["eval size"] == size
    values = [row["metrics"]["pixel_auroc"] for row in rows.values()]
    assert len(set(values)) == 3
    assert max(values) - min(values) < 0.05
    assert len({row["metrics"]["image_auroc"] for row in rows.values()}) == 1
    by_key = evaluated(exp, data, "-o", "eval.size=256")
    assert by_key["metrics"] == rows["256"]["metrics"]


def test_the_batch_size_changes_no_number(exp, data):
    one, five = (evaluated(exp, data, "-o", f"eval.batch_size={n}") for n in (1, 5))
    for a, b in zip(one["images"], five["images"], strict=True):
        assert a["score"] == pytest.approx(b["score"], rel=1e-6)
    assert one["metrics"] == pytest.approx(five["metrics"], abs=1e-6)


def test_missing_masks_are_not_zero(exp, own_data, capsys):
    shutil.rmtree(own_data / "bottle/ground_truth")
    row = evaluated(exp, own_data)
    metrics = row["metrics"]
    assert metrics["image_auroc"] is not None
    assert metrics["pixel_auroc"] is None
    assert metrics["aupro_0.3"] is None
    assert "no ground-truth mask" in row["reasons"]["pixel_auroc"]
    out = capsys.readouterr().out
    assert "pixel-auc:n/a" in out
    assert "0.000" not in out.split("category")[1].split("false alarms")[0]
    assert "n/a because no ground-truth mask" in out


def test_single_missing_masks_can_be_left_out(exp, own_data, capsys):
    (own_data / "bottle/ground_truth/contamination/000_mask.png").unlink()
    assert evaluated(exp, own_data)["metrics"]["pixel_auroc"] is None
    row = evaluated(exp, own_data, "--allow-missing-masks")
    assert row["metrics"]["pixel_auroc"] is not None
    assert "leave out 1 image" in capsys.readouterr().out


def test_a_test_set_of_good_images_only(exp, own_data, tmp_path, capsys):
    for defect in ("broken_large", "broken_small", "contamination"):
        shutil.rmtree(own_data / "bottle/test" / defect)
    markdown = tmp_path / "table.md"
    row = evaluated(exp, own_data, "--markdown", str(markdown))
    assert row["metrics"]["image_auroc"] is None
    assert row["metrics"]["miou"] is not None
    assert "EVAL:  image-auc : n/a pixel-auc:n/a" in capsys.readouterr().out
    table = markdown.read_text(encoding="utf-8")
    assert "| n/a |" in table
    assert "no defective images" in table
    assert "NaN" not in (exp / "bottle/results.json").read_text()


def test_markdown(exp, data, tmp_path):
    file = tmp_path / "deep/table.md"
    row = evaluated(exp, data, "--markdown", str(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| category | image AUROC | pixel AUROC |")
    assert f"{row['metrics']['image_auroc']:.3f}" in lines[2]
    assert any(f"preset: {PRESET}" in line for line in lines)


def test_all_categories(own_data, tmp_path, capsys):
    shutil.copytree(own_data / "bottle", own_data / "wood")
    for category in ("bottle", "wood"):
        train_tiny(own_data, tmp_path / "exp", "-cat", category, "--epochs", "1")
    capsys.readouterr()
    evaluated(tmp_path / "exp", own_data, "-cat", "all")
    document = json.loads((tmp_path / "exp/results.json").read_text(encoding="utf-8"))
    assert [row["category"] for row in document["rows"]] == ["wood", "bottle"]
    out = capsys.readouterr().out
    assert out.count("EVAL:  image-auc : ") == 2
    assert "\nmean  " in out


@pytest.mark.parametrize(
    "setting",
    ["model.input_size=128", "model.steps=3", "eval.image_threshold=fixed:3", "train.seed=2"],
)
def test_what_training_has_fixed_cannot_be_overridden(exp, data, setting):
    with pytest.raises(UserError, match=f"-o {setting.split('=')[0]}: training has fixed it"):
        evaluated(exp, data, "-o", setting)


def test_no_test_images(exp, own_data):
    shutil.rmtree(own_data / "bottle/test")
    with pytest.raises(UserError, match="no labelled test images"):
        evaluated(exp, own_data)


def test_a_corrupt_test_image_is_named(exp, own_data):
    (own_data / "bottle/test/good/001.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"test/good/001\.png: cannot read this image"):
        evaluated(exp, own_data)


def test_masks_of_another_size_than_the_image(exp, own_data, capsys):
    file = own_data / "bottle/ground_truth/broken_large/000_mask.png"
    mask = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE)
    before = evaluated(exp, own_data)["metrics"]["pixel_auroc"]
    assert "warning" not in capsys.readouterr().out
    double = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    file.write_bytes(cv2.imencode(".png", double)[1].tobytes())
    after = evaluated(exp, own_data)["metrics"]["pixel_auroc"]
    assert after == pytest.approx(before, abs=0.01)
    assert "warning: bottle: 1 mask(s) resized" in capsys.readouterr().out
