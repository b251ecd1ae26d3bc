"""Quantizing the backbone: what is measured, refused and written."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("onnxruntime.quantization", reason="requirements-onnx.txt is not installed")
pytest.importorskip("paddle2onnx", reason="requirements-onnx.txt is not installed")

from deploy import infer, parity, quantize
from deploy.bundle import read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions
from metrics.threshold import percentile
from tests.small_run import copy_bottle, export, train_tiny
from utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `data`, and the bundle `whole` of a run trained on it, with model.onnx."""
    folder = tmp_path_factory.mktemp("quantize")
    copy_bottle(folder / "data", train=12)
    train_tiny(folder / "data", folder / "exp")
    with pytest.MonkeyPatch.context() as patch:
        few = {name: parity.CANDIDATES[name] for name in ("paddle", "onnx")}
        patch.setattr(parity, "CANDIDATES", few)  # the others are not tried, to save time
        export(folder / "exp", folder / "whole", folder / "data", "--onnx")
    return folder


def quantized(made: Path, target: Path, *more: str) -> dict:
    args = ["--save_inference_dir", str(made / "whole"), "--data", str(made / "data")]
    assert quantize.main([*args, "--output", str(target), *more]) == 0
    return yaml.safe_load((target / "inference.yml").read_text(encoding="utf-8"))


def test_a_quantized_bundle(made, tmp_path, capsys):
    about = quantized(made, tmp_path / "q", "--max-drop", "1", "--layers", "3")
    out = capsys.readouterr().out
    assert f"quantized model has been saved into {tmp_path / 'q'}" in out
    assert "image AUROC" in out
    assert sorted(about["files"]) == ["model.onnx"]
    report = about["quantization"]
    assert (report["images"], report["labelled"]) == (9, 9)
    assert 0 < report["map_difference"] < 10
    assert report["mb"][1] < report["mb"][0]
    bundle = read_bundle(tmp_path / "q")
    for name in ("auto", "onnx"):
        engine, _ = create_engine(bundle, EngineOptions(engine=name))
        assert engine.name == "onnx"
    for name in ("paddle", "openvino"):
        with pytest.raises(
            UserError, match="is quantized, and its thresholds are for ONNX Runtime"
        ):
            create_engine(bundle, EngineOptions(engine=name))


def test_thresholds_are_fitted_to_the_new_scores(made, tmp_path):
    quantized(made, tmp_path / "q", "--max-drop", "1")
    whole, small = read_bundle(made / "whole"), read_bundle(tmp_path / "q")
    args = ["--save_inference_dir", str(tmp_path / "q"), "--engine", "onnx", "--image_path"]
    held_out = tmp_path / "held out"
    held_out.mkdir()
    from datasets.folder import find_category

    _, holdout = quantize.normals(whole, find_category(made / "data", "bottle"))
    for record in holdout:
        shutil.copy(record.path, held_out)
    assert infer.main([*args, str(held_out), "--output", str(tmp_path / "o")]) == 0
    lines = (tmp_path / "o/results.jsonl").read_text(encoding="utf-8").splitlines()
    scores = np.array([json.loads(line)["score"] for line in lines])
    expected = percentile(scores, 99)
    assert small.image_threshold.value == pytest.approx(expected.value, rel=1e-6)
    assert small.image_threshold.normals == len(holdout) == whole.image_threshold.normals
    assert small.image_threshold.value != whole.image_threshold.value
    assert small.nll is not None
    assert small.nll != whole.nll


@pytest.mark.parametrize(
    ("auroc", "change", "message"),
    [
        ([0.99, 0.975], 0.0, r"AUROC falls by 0\.0150, more than --max-drop 0\.01"),
        ([], 0.06, r"order of scores changes by 0\.0600, more than --max-rank-change 0\.05"),
        ([], float("nan"), "order of scores changes by nan"),
    ],
)
def test_what_loses_too_much_is_refused(auroc, change, message):
    args = Namespace(output="out", save_inference_dir="in", max_drop=0.01, max_rank_change=0.05)
    with pytest.raises(UserError, match=message):
        quantize.refuse_losses({"auroc": auroc, "rank_change": change}, args)
    quantize.refuse_losses({"auroc": [0.99, 0.985], "rank_change": 0.9}, args)
    quantize.refuse_losses({"auroc": [], "rank_change": 0.04}, args)


def test_nothing_is_written_when_it_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="not written"):
        quantized(made, tmp_path / "q", "--max-drop", "-1")
    assert not (tmp_path / "q").exists()


def test_without_labels_the_order_of_scores_counts(made, tmp_path, capsys):
    shutil.copytree(made / "data/bottle/train", tmp_path / "data/bottle/train")
    args = ["--save_inference_dir", str(made / "whole"), "--data", str(tmp_path / "data")]
    more = ["--output", str(tmp_path / "q"), "--layers", "1", "--max-rank-change", "2"]
    assert quantize.main([*args, *more]) == 0
    out = capsys.readouterr().out
    assert "held-out good images" in out
    assert "AUROC" not in out


def test_mistakes(made, tmp_path):
    quantized(made, tmp_path / "q", "--max-drop", "1", "--layers", "1")
    data = ["--data", str(made / "data"), "--output", str(tmp_path / "n")]
    with pytest.raises(UserError, match="is quantized already"):
        quantize.main(["--save_inference_dir", str(tmp_path / "q"), *data])
    same = ["--save_inference_dir", str(made / "whole"), *data[:2]]
    with pytest.raises(UserError, match="is the bundle itself; name another folder"):
        quantize.main([*same, "--output", f"{made}/../{made.name}/whole"])
    other = copy_bottle(tmp_path / "other", train=9)
    with pytest.raises(UserError, match="the model's own training data are needed"):
        quantize.main(
            ["--save_inference_dir", str(made / "whole"), "--data", str(other), *data[2:]]
        )
    (tmp_path / "w").mkdir()
    for name in ("inference.json", "inference.pdiparams"):
        shutil.copy(made / "whole" / name, tmp_path / "w")
    about = yaml.safe_load((made / "whole/inference.yml").read_text(encoding="utf-8"))
    del about["files"]["model.onnx"]
    (tmp_path / "w/inference.yml").write_text(yaml.safe_dump(about), encoding="utf-8")
    with pytest.raises(UserError, match=r"has no model\.onnx; export it again with --onnx"):
        quantize.main(["--save_inference_dir", str(tmp_path / "w"), *data])
    assert not (tmp_path / "n").exists()
