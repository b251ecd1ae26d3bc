"""What an evaluation leaves: rows that say what they rest on, and the report of eval.py."""

import json
import re
import shutil
from pathlib import Path

import pytest

import eval as evaluation
from engine.log import training_cost
from tests.small_run import DEFECTS, tiny_config, train_tiny, untrained_run


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def reported(exp: Path, data: Path, *more: str) -> tuple[dict, str]:
    """Run eval.py --report in this process; return the row and the page."""
    args = ["--exp_dir", str(exp), "--data", str(data), "--report", *more]
    assert evaluation.main(args) == 0
    folder = exp if "all" in more else exp / "bottle"
    row = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"][0]
    return row, (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_lies_beside_the_results(exp, data, capsys):
    row, page = reported(exp, data)
    assert f"report in {exp / 'bottle/report.html'}" in capsys.readouterr().out
    assert page.startswith("<!DOCTYPE html>\n")
    metrics = row["metrics"]
    for figure in ("image_auroc", "pixel_auroc", "aupro_0.3", "miou"):
        assert f"<dd>{metrics[figure]:.3f}</dd>" in page
    wrong = int(metrics["image_fp"] + metrics["image_fn"])
    assert f"{wrong or 'none'} of 9 verdicts wrong: {int(metrics['image_fp'])} of 3 good" in page
    assert page.count('class="shot wrong"') == wrong
    assert len(re.findall('class="shot[ "]', page)) == 9
    meta = json.loads((exp / "bottle/best/meta.json").read_text(encoding="utf-8"))
    assert meta["backbone"]["sha256"] in page
    assert meta["data"]["digest"] in page
    assert "head.safetensors" in page
    assert "input_size:" in page
    assert "numpy, evaluation" in page
    assert f"threshold of the run, {row['thresholds']['image']['value']:.4g}" in page


def test_without_the_flag_there_is_no_report(exp, data):
    (exp / "bottle/report.html").unlink(missing_ok=True)
    assert evaluation.main(["--exp_dir", str(exp), "--data", str(data)]) == 0
    assert not (exp / "bottle/report.html").exists()


def test_binned_metrics_by_the_command_line(exp, data, capsys):
    whole, _ = reported(exp, data)
    assert evaluation.main(["--exp_dir", str(exp), "--data", str(data), "--binned"]) == 0
    assert "warning: bottle: binned: the exact values differ by at most" in capsys.readouterr().out
    row = json.loads((exp / "bottle/results.json").read_text(encoding="utf-8"))["rows"][0]
    assert row["images"] == whole["images"]
    for name in ("image_auroc", "miou", "pro", "pixel_f1"):
        assert row["metrics"][name] == whole["metrics"][name], name
    assert row["metrics"]["pixel_auroc"] == pytest.approx(whole["metrics"]["pixel_auroc"], abs=1e-3)
    with pytest.raises(SystemExit):
        evaluation.main(["--exp_dir", str(exp), "--binned", "--report"])
    assert "leave one of both out" in capsys.readouterr().err


def test_the_row_says_what_it_rests_on(exp, data):
    row, _ = reported(exp, data)
    calibration = json.loads((exp / "bottle/best/meta.json").read_text())["calibration"]
    assert row["thresholds"] == {"image": calibration["image"], "pixel": calibration["pixel"]}
    assert row["training_images"] == 8
    assert row["config"]["train"]["seed"] == row["settings"]["seed"] == 0
    assert row["cost"]["seconds"] > 0
    assert row["cost"]["memory_mb"] > 100
    assert row["cost"]["training_seconds"] > 0
    assert row["cost"]["training_memory_mb"] > 100
    assert row["warnings"] == []


def test_scores_relative_to_the_test_set_have_no_threshold(data, tmp_path):
    """CFLOW-AD with eval.norm dataset: verdicts, outlines and scale cannot be those of the run."""
    config = tiny_config(preset="cflow_efficientnet_lite0")
    untrained_run(tmp_path / "e/bottle", config)
    row, page = reported(tmp_path / "e", data, "--norm", "dataset")
    assert row["thresholds"] == {"image": None, "pixel": None}
    assert row["settings"]["image threshold"] == "none"
    assert {image["defective"] for image in row["images"]} == {None}
    assert "scores of eval.norm dataset depend on the other test images" in page
    assert "from these maps, for want of a calibration" in page
    assert len(re.findall('class="shot[ "]', page)) == 9


def test_without_masks(exp, own_data):
    shutil.rmtree(own_data / "bottle/ground_truth")
    row, page = reported(exp, own_data)
    assert "n/a: no ground-truth mask for 6 images" in page
    assert page.count(">no mask<") == 6
    assert f"<dd>{row['metrics']['image_auroc']:.3f}</dd><" in page
    assert page.count("<dd>n/a</dd>") == 3  # pixel AUROC, AUPRO, mIoU


def test_a_test_set_of_good_images_only(exp, own_data):
    for defect in DEFECTS:
        shutil.rmtree(own_data / "bottle/test" / defect)
    row, page = reported(exp, own_data)
    assert "test set has no defective images" in page
    assert len(re.findall('class="shot[ "]', page)) == 3
    assert row["metrics"]["false_alarm_rate"] is not None


def test_several_categories_in_one_file(own_data, tmp_path):
    shutil.copytree(own_data / "bottle", own_data / "wood")
    for category in ("bottle", "wood"):
        train_tiny(own_data, tmp_path / "exp", "-cat", category, "--epochs", "1")
    _, page = reported(tmp_path / "exp", own_data, "-cat", "all")
    parts = re.findall(r"<details[^>]*>", page)
    assert [part for part in parts if "category" in part] == [
        f'<details open="open" class="category" id="{name}">' for name in ("wood", "bottle")
    ]
    assert "mean image AUROC" in page
    assert "None is known of FastFlow on efficientnet_lite0" in page


def test_costs_of_a_training(tmp_path):
    assert training_cost(tmp_path) == {"training_seconds": None, "training_memory_mb": None}
    events = [
        {"event": "step", "step": 1, "loss": 0.5}, {"event": "epoch", "step": 1, "seconds": 2.0},
        {"event": "epoch", "step": 2, "seconds": 50.0},  # cut off, then run again
        {"event": "epoch", "step": 2, "seconds": 3.5}, {"event": "done", "step": 2, "memory_mb": 7},
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    assert training_cost(tmp_path) == {"training_seconds": 5.5, "training_memory_mb": 7}
    (tmp_path / "log.jsonl").write_text("{broken\n")
    assert training_cost(tmp_path)["training_seconds"] is None
