"""Every flow from the command line, from training to the exported graph; and what is its own."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest

import eval as evaluation
import predict
import train
from deploy import infer
from engine import checkpoint, inputs, session
from engine.batches import in_order
from models.flows.cflow import log_likelihoods
from tests.small_run import REPO, export, start, tiny_config
from utils.errors import UserError

SMALL = {
    "cflow": ("model.input_size=64", "model.steps=2", "train.lr=0.001"),
    "csflow": ("model.input_size=128", "model.blocks=1", "model.hidden=8"),
    "uflow": ("model.input_size=64", "model.steps=2", "model.blur_sigma=1.0"),
}


def arguments(flow: str, data: Path, exp: Path, *settings: str) -> list[str]:
    every = (
        *SMALL[flow], "data.holdout=0.25", "data.workers=0", "train.batch_size=4",
        "eval.batch_size=4", f"data.cache_dir={exp.parent / 'cache'}", *settings,
    )  # fmt: skip
    return [
        "-cfg", str(REPO / f"configs/{flow}_efficientnet_lite0.yaml"), "--data", str(data),
        "--exp_dir", str(exp), "--device", "cpu", "--epochs", "2",
        *(text for setting in every for text in ("-o", setting)),
    ]  # fmt: skip


def trained(flow: str, data: Path, exp: Path, *settings: str) -> Path:
    assert train.main(arguments(flow, data, exp, *settings)) == 0
    return exp / "bottle"


def evaluated(exp: Path, data: Path, *more: str) -> dict:
    assert evaluation.main(["--exp_dir", str(exp), "--data", str(data), *more]) == 0
    return json.loads((exp / "bottle/results.json").read_text(encoding="utf-8"))["rows"][0]


def results(folder: Path) -> list[dict]:
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tensors(run: Path) -> dict[str, bytes]:
    names = (checkpoint.HEAD, checkpoint.OPTIMIZER)
    return {name: (run / "last" / name).read_bytes() for name in names}


@pytest.fixture(scope="module", params=list(SMALL))
def run(request, data, tmp_path_factory) -> tuple[str, Path]:
    """The flow and the experiment of a small finished run."""
    exp = tmp_path_factory.mktemp(request.param) / "exp"
    trained(request.param, data, exp)
    return request.param, exp


def test_the_whole_way(run, data, tmp_path):
    """Scores of evaluation, prediction and the exported graph are one number."""
    _, exp = run
    row = evaluated(exp, data)
    assert 0 <= row["metrics"]["image_auroc"] <= 1
    assert 0 <= row["metrics"]["pixel_auroc"] <= 1
    scores = {Path(i["path"]).parent.name + Path(i["path"]).name: i for i in row["images"]}
    bundle = export(exp, tmp_path / "bundle", data)
    pictures = str(data / "bottle/test")
    assert predict.main(
        ["--exp_dir", str(exp), "--image_path", pictures, "--output", str(tmp_path / "p")]
    ) == 0  # fmt: skip
    assert infer.main(
        ["--save_inference_dir", str(bundle), "--image_path", pictures, "--output",
         str(tmp_path / "i"), "--batch_size", "3"]
    ) == 0  # fmt: skip
    predicted, inferred = results(tmp_path / "p"), results(tmp_path / "i")
    assert len(predicted) == len(inferred) == len(scores) == 9
    for ours, theirs in zip(predicted, inferred, strict=True):
        known = scores[Path(ours["path"]).parent.name + Path(ours["path"]).name]
        assert ours["score"] == pytest.approx(known["score"], rel=1e-5)
        assert theirs["score"] == pytest.approx(known["score"], rel=1e-5)
        assert (ours["verdict"] == "Anomaly") == known["defective"]
        assert theirs["verdict"] == ours["verdict"]
        assert ("log_nfa" in theirs) == ("log_nfa" in ours)
        if "log_nfa" in ours:
            assert theirs["log_nfa"] == pytest.approx(ours["log_nfa"], rel=1e-3, abs=1e-3)


def test_a_score_does_not_depend_on_its_batch(run):
    _, exp = run
    _, detector, _ = session.open_detector(str(exp), "bottle", "best")
    height, width = detector.input_size
    images = paddle.rand([5, 3, height, width])
    with paddle.no_grad():
        together = detector(images)[1].numpy()
        alone = [detector(images[i : i + 1])[1].item() for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


# --- CFLOW-AD


def test_fibre_batches_train_and_resume_bit_equal(data, tmp_path):
    settings = (
        "train.fiber_batch=8", "data.rotation=5", "train.sub_epochs=2", "train.schedule=cosine",
        "train.warmup_epochs=1",
    )  # fmt: skip
    whole = trained("cflow", data, tmp_path / "whole", *settings)
    args = arguments("cflow", data, tmp_path / "parts", *settings)
    child = start("train.py", *args)
    part = tmp_path / "parts/bottle"
    while child.poll() is None and not (part / "last" / checkpoint.META).is_file():
        paddle.rand([1])  # wait for the first epoch
    child.kill()
    child.wait()
    assert train.main([*args, "--resume"]) == 0
    assert tensors(part) == tensors(whole)
    log = (whole / "train.log").read_text(encoding="utf-8")
    assert "iter: 4/4" in log  # two passes of two batches
    assert "-ln sigmoid" in log


def test_too_large_a_fibre_batch_is_one_line(data, tmp_path):
    with pytest.raises(UserError, match=r"train\.fiber_batch: a level has 16 fibres .* merge"):
        trained("cflow", data, tmp_path / "exp", "train.fiber_batch=20")


def test_the_scorer_knows_the_likeliest_training_fibre(data, tmp_path):
    run = trained("cflow", data, tmp_path / "exp")
    found, detector, _ = session.open_detector(str(tmp_path / "exp"), "bottle", "last")
    category = inputs.find_trainable(found.config, ["bottle"])[0]
    records, _ = inputs.split_holdout(category.train, 0.25, 0)
    source = inputs.image_source(records, found.config, detector)
    peaks = []
    for features in source.pyramids(in_order(source.count, 4)):
        with paddle.no_grad():
            levels = log_likelihoods(*detector.flow(features))
        peaks.append([float(level.max()) for level in levels])
    np.testing.assert_allclose(detector.scorer.peaks.numpy(), np.max(peaks, 0), rtol=1e-5)
    assert run.is_dir()


def test_scores_relative_to_a_set_are_for_comparison_only(data, tmp_path, capsys):
    trained("cflow", data, tmp_path / "exp")
    own = evaluated(tmp_path / "exp", data)
    dataset = evaluated(tmp_path / "exp", data, "--norm", "dataset")
    whole = evaluated(tmp_path / "exp", data, "--norm", "batch", "-o", "eval.batch_size=100")
    single = evaluated(tmp_path / "exp", data, "--norm", "batch", "-o", "eval.batch_size=1")
    assert dataset["settings"]["norm"] == "dataset"
    assert "norm" not in own["settings"]
    assert dataset["images"][0]["defective"] is None
    assert "only for comparison" in capsys.readouterr().out
    assert whole["metrics"]["pixel_auroc"] == pytest.approx(dataset["metrics"]["pixel_auroc"])
    assert single["metrics"]["pixel_auroc"] != pytest.approx(dataset["metrics"]["pixel_auroc"])
    with pytest.raises(UserError, match=r"only model\.flow cflow knows it"):
        tiny_config("eval.norm=batch")


# --- CS-Flow


def test_training_from_extracted_features(data, tmp_path):
    """The same run as from images, up to the order of the hold-out; images are not read."""
    import extract_features

    exp = tmp_path / "exp"
    args = arguments("csflow", data, exp)
    same = [a for i, a in enumerate(args) if a not in ("--exp_dir", "--epochs") and (
        args[i - 1] not in ("--exp_dir", "--epochs"))]  # fmt: skip
    assert extract_features.main([*same, "--output", str(tmp_path / "features")]) == 0
    setting = f"data.features={tmp_path / 'features'}"
    run = trained("csflow", tmp_path / "nowhere", exp, setting)
    direct = trained("csflow", data, tmp_path / "direct")
    losses = [
        [e["holdout_nll"] for e in map(json.loads, (r / "log.jsonl").read_text().splitlines())
         if e["event"] == "epoch"] for r in (run, direct)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    other = arguments("csflow", data, tmp_path / "other", setting, "model.input_size=256")
    with pytest.raises(UserError, match="extract"):
        train.main(other)


@pytest.mark.slow
def test_the_dummy_set_of_cs_flow_separates(shared_data, tmp_path):
    """Four squares to train on, RGBA; squares against circles, without masks."""
    args = [
        "-cfg", str(REPO / "configs/csflow_efficientnet_lite0.yaml"), "--data", str(shared_data),
        "-cat", "dummy_data", "--exp_dir", str(tmp_path / "exp"), "--device", "cpu", "--epochs",
        "12", "-o", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    assert train.main(args) == 0
    options = ["--exp_dir", str(tmp_path / "exp"), "-cat", "dummy_data", "--is_last"]
    assert evaluation.main(options) == 0
    file = tmp_path / "exp/dummy_data/results.json"
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert row["metrics"]["image_auroc"] == 1
    assert row["metrics"]["pixel_auroc"] is None


def test_the_korean_rules(data, tmp_path):
    settings = ("train.select_on=test", "model.score=std", "train.sub_epochs=2")
    trained("csflow", data, tmp_path / "exp", *settings)
    row = evaluated(tmp_path / "exp", data)
    assert row["settings"]["checkpoint"] == "best on test"
    assert row["metrics"]["zero_miss_overkill"] is not None


# --- U-Flow and its test


NFA = ("nfa.method=tree", "nfa.tests=by_size", "eval.pixel_threshold=nfa")


@pytest.mark.parametrize("flow", ["uflow", "cflow"])
def test_the_nfa_threshold(flow, data, tmp_path):
    size = "model.input_size=128"  # the coarsest level needs 3 rows
    run = trained(flow, data, tmp_path / "exp", size, *NFA, "eval.image_threshold=nfa")
    stored = json.loads((run / "best" / checkpoint.META).read_text())["calibration"]
    assert stored["pixel"]["policy"] == stored["image"]["policy"] == "nfa"
    assert 0 <= stored["pixel"]["measured_rate"] <= 1
    assert stored["nfa"]["tests"] == "by_size"
    row = evaluated(tmp_path / "exp", data)
    assert row["metrics"]["miou"] == row["metrics"]["miou_nfa"]
    assert row["metrics"]["miou_nfa"] <= row["metrics"]["miou_nfa_oracle"]
    bundle = export(tmp_path / "exp", tmp_path / "bundle", data)
    (file,) = list((data / "bottle/test/contamination").glob("*"))[:1]
    for script, place in (
        (predict, ["--exp_dir", str(tmp_path / "exp")]),
        (infer, ["--save_inference_dir", str(bundle)]),
    ):
        out = tmp_path / script.__name__
        assert script.main([*place, "--image_path", str(file), "--output", str(out)]) == 0
    ours, theirs = results(tmp_path / "predict"), results(tmp_path / "deploy.infer")
    assert ours[0]["log_nfa"] == pytest.approx(theirs[0]["log_nfa"], rel=1e-3, abs=1e-3)
    assert (ours[0]["verdict"] == "Anomaly") == (ours[0]["log_nfa"] < 0)
    assert bool(ours[0]["regions"]) == (ours[0]["log_nfa"] < 0)


def test_the_block_test_in_high_precision(data, tmp_path):
    settings = ("nfa.method=block", "nfa.probability=0.8", "eval.pixel_threshold=nfa")
    trained("uflow", data, tmp_path / "exp", "model.input_size=128", *settings)
    image = str(data / "bottle/test/good/000.png")
    found = []
    for name, more in (("coarse", ()), ("fine", ("-hp",))):
        out = tmp_path / name
        args = ["--exp_dir", str(tmp_path / "exp"), "--image_path", image, "--output", str(out)]
        assert predict.main([*args, *more]) == 0
        found.append(results(out)[0]["log_nfa"])
    assert found[0] != found[1]
    assert evaluated(tmp_path / "exp", data, "-hp")["metrics"]["miou_nfa"] is not None


def test_too_small_a_map_for_the_test_is_refused_before_training():
    with pytest.raises(UserError, match="at least 3 rows"):
        tiny_config("nfa.method=tree", preset="cflow_efficientnet_lite0")


def test_best_by_several_metrics(data, tmp_path):
    settings = ("train.best_by=[auroc,aupro,miou]", "nfa.tests=by_size")
    run = trained("uflow", data, tmp_path / "exp", *settings)
    assert checkpoint.names(run) == ["last", "best", "best_aupro", "best_auroc", "best_miou"]
    row = evaluated(tmp_path / "exp", data, "--checkpoint", "best_aupro")
    assert row["settings"]["checkpoint"] == "best by aupro on test"
    stored = json.loads((run / "best_aupro" / checkpoint.META).read_text())
    assert stored["progress"]["best"]["best_aupro"][0] == pytest.approx(
        row["metrics"]["aupro_0.3"], abs=1e-6
    )
    with pytest.raises(UserError, match="there is last, best, best_aupro, best_auroc, best_miou"):
        evaluated(tmp_path / "exp", data, "--checkpoint", "best_f1")
