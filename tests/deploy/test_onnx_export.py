"""ONNX: the converted graph, its names, the engines that run it, and converters that fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from deploy import export_model, onnx_export
from deploy.bundle import Bundle, read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions, open_engine
from engine.evaluator import run
from models.detector import Detector
from tests.small_run import (
    REPO,
    copy_bottle,
    export,
    photographs,
    tiny_config,
    untrained_run,
)
from utils.errors import UserError

onnx = pytest.importorskip("onnx", reason="requirements-onnx.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
pytest.importorskip("paddle2onnx", reason="requirements-onnx.txt is not installed")

PRESET = "uflow_efficientnet_lite0"  # with evidence


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Bundle, Detector]:
    folder = tmp_path_factory.mktemp("onnx")
    detector = untrained_run(folder / "exp/bottle", tiny_config(preset=PRESET))
    data = copy_bottle(folder / "data", train=3, good=3, defective=1)
    made = export(folder / "exp", folder / "bundle", data, "--onnx")
    return read_bundle(made), detector


def names(values) -> dict[str, list]:
    shapes = {v.name: v.type.tensor_type.shape.dim for v in values}
    return {name: [d.dim_param or d.dim_value for d in dims] for name, dims in shapes.items()}


def test_names_and_shapes(made):
    graph = onnx.load(str(made[0].onnx)).graph
    assert names(graph.input) == {"image": ["batch", 3, 64, 64]}
    assert names(graph.output) == {
        "anomaly_map": ["batch", 1, 64, 64], "score": ["batch"],
        "nll": ["batch"], "evidence_0": ["batch", 16, 16], "evidence_1": ["batch", 8, 8],
        "evidence_2": ["batch", 4, 4],
    }  # fmt: skip
    described = yaml.safe_load((made[0].folder / "inference.yml").read_text(encoding="utf-8"))
    assert described["outputs"] == list(names(graph.output))
    assert "model.onnx" in described["files"]


def test_every_engine_is_recorded(made):
    engines = made[0].engines
    assert list(engines) == ["paddle", "paddle_onednn", "onnx", "openvino"]
    assert engines["onnx"]["passed"]
    assert engines["onnx"]["max_map_difference"] <= 1e-4
    openvino = engines["openvino"]
    assert openvino["passed"] or "openvino is not installed; pip install" in openvino["reason"]


@pytest.mark.parametrize(("name", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_the_numbers_of_the_dynamic_model(made, name, module):
    pytest.importorskip(module)
    images = photographs(6, 64)
    expected = run(made[1], images)
    assert expected.nll is not None
    engine, note = create_engine(made[0], EngineOptions(engine=name, cpu_threads=2))
    assert note == ""
    for count in (1, 5, 2):  # a smaller batch after a larger one
        maps, scores, evidence, nll = engine.run(images[:count])
        np.testing.assert_allclose(scores, expected.scores[:count], rtol=1e-5, atol=1e-5)
        assert nll is not None
        np.testing.assert_allclose(nll, expected.nll[:count], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(maps, expected.maps[:count], rtol=1e-4, atol=1e-4)
        for found, level in zip(evidence, expected.evidence, strict=True):
            np.testing.assert_allclose(found, level[:count], rtol=1e-4, atol=1e-4)
    assert np.ptp(expected.scores) > 1e-3
    kept = engine.run(images[:1])
    engine.run(images[1:2])  # results are not overwritten by the next ones
    np.testing.assert_array_equal(kept[0], engine.run(images[:1])[0])
    assert module in engine.version()


def test_without_paddle(made, tmp_path):
    """A factory's PC: ONNX Runtime, the bundle, deploy/, metrics/ and utils/."""
    for package in ("deploy", "metrics", "utils"):
        shutil.copytree(REPO / package, tmp_path / package)
    images = copy_bottle(tmp_path / "data", train=0, good=2, defective=1) / "bottle/test"
    code = (
        "import sys; sys.modules['paddle'] = None\n"
        "from deploy import infer\n"
        "sys.exit(infer.main(sys.argv[1:]))"
    )
    found = {}
    for engine in ("onnx", "auto"):
        done = subprocess.run(
            [sys.executable, "-c", code, "--save_inference_dir", str(made[0].folder), "--engine",
             engine, "--image_path", str(images), "--output", str(tmp_path / engine)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / engine / "results.jsonl").read_text(encoding="utf-8").splitlines()
        found[engine] = [json.loads(line)["score"] for line in lines]
        assert len(found[engine]) == 5
    np.testing.assert_allclose(found["auto"], found["onnx"], rtol=1e-5)


def test_openvino_that_is_not_installed_is_no_error(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="--engine openvino: openvino is not installed; pip"):
        open_engine(made[0], EngineOptions(engine="openvino"))


# --- converters that fail


def child(code: int, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", stderr)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (child(-6), r"paddle2onnx crashed \(code -6\)"),
        (child(134), r"paddle2onnx crashed \(code 134\)"),
        (child(255, "x\nno such operator\n"), r"paddle2onnx failed \(code 255: no such operator\)"),
        (child(0), "paddle2onnx wrote no file"),
    ],
)
def test_a_failing_conversion_is_one_line(tmp_path, monkeypatch, result, words):
    opsets = []

    def start(command: list[str], **keywords) -> subprocess.CompletedProcess[str]:
        opsets.append(command[-1])
        return result

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(UserError, match=f"--onnx: {words}; nothing was written") as caught:
        onnx_export.convert(tmp_path, ["anomaly_map", "score"])
    assert "\n" not in str(caught.value)
    assert opsets == ["16", "13"]


def test_a_conversion_that_hangs(tmp_path, monkeypatch):
    def hang(*args, **keywords):
        raise subprocess.TimeoutExpired("python", keywords["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UserError, match="--onnx: paddle2onnx took longer than 1800 s"):
        onnx_export.convert(tmp_path, ["anomaly_map", "score"])


def test_a_real_abort(tmp_path):
    """An operator that paddle2onnx does not know ends its process, not this one."""
    import paddle

    class Unknown(paddle.nn.Layer):
        def forward(self, image):
            return paddle.amax(image, [2, 3])

    spec = paddle.static.InputSpec([None, 3, 8, 8], "float32", "image")
    static = paddle.jit.to_static(Unknown(), input_spec=[spec], full_graph=True)
    paddle.jit.save(static, str(tmp_path / "inference"))
    (tmp_path / "inference.pdiparams").touch()
    with pytest.raises(UserError, match=r"--onnx: paddle2onnx (crashed|failed) \(code"):
        onnx_export.convert(tmp_path, ["score"])
    assert not (tmp_path / "model.onnx").exists()


def test_a_graph_that_is_not_the_bundles(made, tmp_path):
    shutil.copytree(made[0].folder, tmp_path / "b")
    with pytest.raises(UserError, match="has 1 inputs and 6 outputs instead of 1 and 2"):
        onnx_export._make_readable(tmp_path / "b/model.onnx", ["anomaly_map", "score"])


def test_an_invalid_graph(made, tmp_path):
    model = onnx.load(str(made[0].onnx))
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(UserError, match="--onnx: the converted graph is invalid"):
        onnx_export._make_readable(tmp_path / "model.onnx", list(names(model.graph.output)))


def test_a_failure_leaves_nothing(made, tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("--onnx: paddle2onnx crashed (code -6)")

    monkeypatch.setattr(onnx_export, "convert", fail)
    monkeypatch.setattr(export_model, "save_graph", lambda *args: None)
    root = made[0].folder.parent
    with pytest.raises(UserError, match="paddle2onnx crashed"):
        export(root / "exp", tmp_path / "b", root / "data", "--onnx")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("package", onnx_export.NEEDED)
def test_packages_that_are_missing(tmp_path: Path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    words = f"--onnx: {package} is not installed; pip install -r requirements-onnx.txt"
    with pytest.raises(UserError, match=words):
        export(tmp_path, tmp_path, tmp_path, "--onnx")
