"""Export: the static graph of every configuration gives the numbers of the dynamic model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from datasets.folder import find_category
from deploy import bundle as bundle_module
from deploy import export_model, parity
from deploy.bundle import file_sha256, read_bundle
from deploy.engines import EngineOptions, PaddleEngine
from engine.evaluator import run
from metrics.threshold import Threshold
from tests.small_run import (
    REPO,
    copy_bottle,
    export,
    photographs,
    tiny_config,
    untrained_run,
)
from utils.config import Config
from utils.errors import UserError
from utils.image import to_unit


def about(folder: Path) -> dict:
    return yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_in_a_bundle(bundle, exp):
    assert sorted(contents(bundle)) == ["inference.json", "inference.pdiparams", "inference.yml"]
    found = about(bundle)
    meta = json.loads((exp / "bottle/best/meta.json").read_text(encoding="utf-8"))
    assert found["model"]["category"] == "bottle"
    assert found["model"]["backbone_sha256"] == meta["backbone"]["sha256"]
    assert (found["model"]["checkpoint"], found["model"]["seed"]) == ("best", 0)
    assert found["input"]["size"] == [64, 64]
    assert found["input"]["resize"] == meta["config"]["data"]["resize"]
    assert found["outputs"] == ["anomaly_map", "score", "nll"]
    assert found["nll"] == meta["calibration"]["nll"]
    assert found["input"]["name"] == "image"
    assert found["versions"]["numpy"]
    for name in ("image", "pixel"):
        stored = Threshold.from_dict(found["thresholds"][name])
        assert stored == Threshold.from_dict(meta["calibration"][name])
    assert found["color_scale"] == meta["calibration"]["color_scale"]
    read_bundle(bundle)


def test_the_comparison_is_recorded(bundle):
    recorded = about(bundle)["parity"]
    assert recorded["images"] == 8
    assert 0 <= recorded["score_max_difference"] < 1e-5
    assert 0 <= recorded["map_max_difference"] < 1e-5


def test_engines_are_recorded(bundle):
    engines = about(bundle)["engines"]
    assert list(engines) == ["paddle", "paddle_onednn"]
    for entry in engines.values():
        assert entry["passed"] is True
        assert entry["threads"] == 1
        assert entry["ms"] > 0
    assert (
        engines["paddle"]["max_score_difference"] == about(bundle)["parity"]["score_max_difference"]
    )


def test_images_to_compare_on_are_spread_over_all(data):
    config = tiny_config()
    chosen = export_model.real_images(config, str(data), "bottle")
    assert chosen.shape == (8, 3, 64, 64)
    assert len({image.tobytes() for image in chosen}) == 8
    category = find_category(data, "bottle")
    from engine.inputs import image_reader

    read = image_reader([*category.test, *category.train], config)
    np.testing.assert_array_equal(chosen[0], to_unit(read(np.array([0]))[0][0]))
    last = len(category.test) + len(category.train) - 1
    np.testing.assert_array_equal(chosen[-1], to_unit(read(np.array([last]))[0][0]))


def test_few_images_are_enough(data, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(data / "bottle/test/good/000.png", few)
    assert len(export_model.real_images(tiny_config(), str(few), "bottle")) == 1


def test_best_and_last(exp, data, tmp_path, quick):
    last = export(exp, tmp_path / "b", data, "--is_last")
    assert about(last)["model"]["checkpoint"] == "last"


@pytest.fixture
def quick(bundle, monkeypatch):
    """Take the graph of the finished bundle instead of tracing it again; let all engines pass.

    Return what the engines are found to be; a test may change it.
    """
    found = {"ms": 1.0, "max_score_difference": 3e-5, "max_map_difference": 0.0, "reason": "off"}

    def copy(detector, folder: Path) -> None:
        for name in ("inference.json", "inference.pdiparams"):
            shutil.copy(bundle / name, folder)

    monkeypatch.setattr(export_model, "save_graph", copy)
    monkeypatch.setattr(parity, "check", lambda *args: {"passed": True, "threads": 1, **found})
    return found


def test_a_difference_leaves_nothing(exp, data, tmp_path, quick):
    for worst in (2e-4, float("nan"), float("inf")):
        quick |= {"max_score_difference": worst, "passed": False}
        with pytest.raises(UserError, match=r"not give the model's results: off; nothing was"):
            export(exp, tmp_path / "new", data)
        assert not (tmp_path / "new").exists()


def test_an_engine_that_crashes_leaves_nothing(exp, data, tmp_path, monkeypatch, quick):
    crashed = {"passed": False, "threads": 1, "reason": "it ended with code -11"}
    monkeypatch.setattr(parity, "check", lambda *args: crashed)
    with pytest.raises(UserError, match="it ended with code -11; nothing was written"):
        export(exp, tmp_path / "new", data)
    assert not (tmp_path / "new").exists()


def test_an_engine_of_choice_may_crash(exp, data, tmp_path, monkeypatch, capsys, quick):
    crashed = {"passed": False, "threads": 1, "reason": "it ended with code -11"}
    fine = parity.check("paddle", tmp_path, tmp_path, 1)
    monkeypatch.setattr(parity, "check", lambda name, *args: fine if name == "paddle" else crashed)
    export(exp, tmp_path / "new", data)
    assert about(tmp_path / "new")["engines"]["paddle_onednn"] == crashed
    assert "  paddle_onednn: not usable: it ended with code -11" in capsys.readouterr().out


def test_a_difference_keeps_the_older_bundle(exp, data, bundle, tmp_path, quick):
    shutil.copytree(bundle, tmp_path / "old")
    before = contents(tmp_path / "old")
    quick |= {"max_score_difference": 1.0, "passed": False}
    with pytest.raises(UserError, match="nothing was written"):
        export(exp, tmp_path / "old", data)
    assert contents(tmp_path / "old") == before


def test_a_tiny_difference_is_printed_and_passes(exp, data, tmp_path, capsys, quick):
    export(exp, tmp_path / "b", data, "--cpu_threads", "2")
    out = capsys.readouterr().out
    assert "exported against dynamic model on 8 images, batch sizes 1 and 5:" in out
    line = "  paddle: score differs by at most 3e-05, map by 0, 1 ms per image"
    assert line in out.splitlines()
    assert f"inference model has been saved into {tmp_path / 'b'}" in out


def test_what_the_engines_are_compared_with(exp, data, tmp_path, monkeypatch, quick):
    """The images and outputs of the dynamic model, and the threads of the command line."""
    seen = []

    def check(name: str, folder: Path, sample: Path, threads: int) -> dict:
        read_bundle(folder)
        seen.append((name, parity.Sample.load(sample), threads))
        return {"passed": True, "ms": 1.0, "max_score_difference": 0.0, "max_map_difference": 0.0}

    monkeypatch.setattr(parity, "check", check)
    export(exp, tmp_path / "b", data, "--cpu_threads", "2")
    assert [(name, threads) for name, _, threads in seen] == [("paddle", 2), ("paddle_onednn", 2)]
    chosen = export_model.real_images(tiny_config(), str(data), "bottle")
    np.testing.assert_array_equal(seen[0][1].images, chosen)
    maps, scores, *_ = PaddleEngine(read_bundle(tmp_path / "b"), EngineOptions()).run(chosen)
    np.testing.assert_allclose(seen[0][1].expected[0], maps, atol=1e-5)
    np.testing.assert_allclose(seen[0][1].expected[1], scores, atol=1e-5)


def test_an_older_onnx_graph_goes(exp, data, tmp_path, quick):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/model.onnx").write_bytes(b"of another model")
    export(exp, tmp_path / "b", data)
    assert not (tmp_path / "b/model.onnx").exists()


def test_other_files_in_the_folder_stay(exp, data, tmp_path, quick):
    target = tmp_path / "deploy here"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    (target / "inference.json").write_text("of an older export")
    export(exp, target, data)
    assert (target / "notes.txt").read_text() == "keep"
    read_bundle(target)


def test_an_interrupted_export_is_noticed(exp, data, bundle, tmp_path, monkeypatch, quick):
    """The description comes last: until then its hashes do not fit the new files."""
    target = tmp_path / "b"
    shutil.copytree(bundle, target)
    (target / "inference.pdiparams").write_bytes(b"of another model")
    older = about(target)
    older["files"]["inference.pdiparams"] = file_sha256(target / "inference.pdiparams")
    (target / "inference.yml").write_text(yaml.safe_dump(older))
    read_bundle(target)
    write = bundle_module.atomic_write_bytes
    written: list[str] = []

    def dying(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(bundle_module, "atomic_write_bytes", dying)
    with pytest.raises(KeyboardInterrupt):
        export(exp, target, data)
    assert sorted(written) == ["inference.json", "inference.pdiparams"]
    with pytest.raises(UserError, match=r"not the file that inference\.yml describes"):
        read_bundle(target)


def test_a_run_without_thresholds(exp, data, tmp_path):
    shutil.copytree(exp, tmp_path / "exp")
    file = tmp_path / "exp/bottle/best/meta.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    del meta["calibration"]
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="no thresholds; finish the training"):
        export(tmp_path / "exp", tmp_path / "b", data)


def test_the_training_images_may_be_gone(exp, tmp_path, quick):
    shutil.copytree(exp, tmp_path / "exp")
    file = tmp_path / "exp/bottle/best/meta.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    meta["config"]["data"]["root"] = "gone"
    file.write_text(json.dumps(meta))
    args = ["--exp_dir", str(tmp_path / "exp"), "--save_inference_dir", str(tmp_path / "b")]
    with pytest.raises(UserError, match="gone: no such folder"):
        export_model.main(args)
    assert export_model.main([*args, "--data", str(REPO / "images")]) == 0


def test_the_run_decides_where_to(exp, data, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    assert export_model.main(["--exp_dir", str(exp), "--data", str(data)]) == 0
    read_bundle(tmp_path / "deploy/inference")


def test_exporting_changes_nothing_in_the_run(exp, data, tmp_path, quick):
    before = {p: p.read_bytes() for p in sorted(exp.rglob("*")) if p.is_file()}
    export(exp, tmp_path / "b", data)
    assert {p: p.read_bytes() for p in sorted(exp.rglob("*")) if p.is_file()} == before


def agree(config: Config, tmp_path: Path, images: np.ndarray, tolerance: float) -> None:
    """Export a shaken detector; compare it with the graph for one image and for several."""
    detector = untrained_run(tmp_path / "exp/bottle", config)
    data = copy_bottle(tmp_path / "data", train=1, good=1, defective=1)
    bundle = read_bundle(export(tmp_path / "exp", tmp_path / "bundle", data))
    engine = PaddleEngine(bundle, EngineOptions())
    for count in (1, len(images)):
        maps, scores, *_ = engine.run(images[:count])
        expected_maps, expected, *_ = run(detector, images[:count])
        scale = max(1.0, float(np.abs(expected_maps).max()))
        np.testing.assert_allclose(scores / scale, expected / scale, atol=tolerance)
        np.testing.assert_allclose(maps / scale, expected_maps / scale, atol=tolerance)
    assert np.ptp(scores) > 1e-4  # not all at the end of their range
    assert np.std(maps) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("model.clamp=atan", "model.score=energy", "model.norm=none"),
        ("model.clamp=tanh_scaled", "model.coupling=two_sided", "model.score_from=sharp"),
        ("model.norm=batch", "model.global_scale=raw", "model.align_corners=true"),
    ],
    ids=lambda settings: settings[0],
)
def test_every_switch_can_be_exported(settings, tmp_path):
    agree(tiny_config(*settings), tmp_path, photographs(2, 64), 1e-5)


@pytest.mark.slow
def test_an_input_that_is_not_square(tmp_path):
    images = np.ascontiguousarray(photographs(3, 96)[:, :, :64])
    assert images.shape == (3, 3, 64, 96)
    agree(tiny_config("model.input_size=[64, 96]"), tmp_path, images, 1e-5)
