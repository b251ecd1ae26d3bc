"""Every shipped configuration on every engine: the dynamic model's numbers, at batch 1 and 5."""

import json
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml

from deploy import onnx_export, parity
from deploy.bundle import FORMAT, file_sha256, read_bundle
from deploy.engines import open_engine
from deploy.export_model import output_names, save_graph
from deploy.parity import CANDIDATES, Sample
from engine.evaluator import run
from metrics.threshold import fixed
from models.backbones import efficientnet_b5
from models.backbones.resnet import WideResNet50
from models.detector import Detector
from tests import test_configs
from tests.small_run import photographs
from utils.config import Config

# What oneDNN or paddle2onnx refuse, or get wrong (measured with Paddle 3.3.1, paddle2onnx 2.1.0).
REFUSED = re.compile(r"softplus|interp|group_norm|amax|amin|leaky_relu|pixel_unshuffle")
made = test_configs.made  # the fixture
TRANSFORMERS = ("deit_base_distilled_384", "cait_m48_448", "mcait")


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Give EfficientNet-B5 one block per stage: through 36 random ones, rounding grows a lot.

    Make Wide-ResNet-50 an ordinary one, take two steps per level, and time nothing for long.
    """
    stages = [(*shape, 1) for *shape, _ in efficientnet_b5.STAGES]
    monkeypatch.setattr(efficientnet_b5, "STAGES", stages)
    channels = {2: (1, 24), 4: (2, 40), 8: (3, 64), 16: (5, 176), 32: (6, 304)}
    monkeypatch.setattr(efficientnet_b5.EfficientNetB5, "taps", channels)
    monkeypatch.setattr(WideResNet50, "width", 64)
    monkeypatch.setattr(parity, "TIMED_SECONDS", 0.0)
    for flow in ("fastflow", "uflow"):  # tracing a graph takes the longest
        monkeypatch.setitem(test_configs.SMALLER, flow, ["model.steps=2"])


def operators(folder: Path) -> set[str]:
    """Return the operators of a graph, without their dialect."""
    text = (folder / "inference.json").read_text(encoding="utf-8")
    return {name.partition(".")[2] for name in re.findall(r'"#":\s*"(1\.[a-z0-9_]+)"', text)}


def write_bundle(folder: Path, detector: Detector, outputs: list[str]) -> None:
    """Write graphs and a description that is enough to run them."""
    save_graph(detector, folder)
    onnx_export.convert(folder, outputs)
    threshold = fixed(0.5).to_dict()
    about = {
        "format": FORMAT, "input": {"size": list(detector.input_size), "resize": "pil"},
        "thresholds": {"image": threshold, "pixel": threshold}, "color_scale": [0, 1],
        "outputs": outputs, "files": {p.name: file_sha256(p) for p in folder.iterdir()},
    }  # fmt: skip
    (folder / "inference.yml").write_text(yaml.safe_dump(about), encoding="utf-8")


@pytest.mark.slow
def test_parity(made: tuple[Config, Detector], tmp_path):
    for module in ("onnx", "onnxruntime", "paddle2onnx", "openvino"):
        pytest.importorskip(module, reason="requirements-onnx.txt, requirements-openvino.txt")
    config, detector = made
    images = photographs(8, config.model.input_size[0])
    with paddle.no_grad():
        levels = detector.features(paddle.to_tensor(images))
        detector.fit_scorer([[level[i : i + 1] for level in levels] for i in range(4)])
    output = run(detector, images)
    assert np.ptp(output.scores) > 0
    sample = Sample(images, (output.maps, output.scores, output.evidence))
    (tmp_path / "b").mkdir()
    write_bundle(tmp_path / "b", detector, output_names(output))
    found = {}
    for name, options in CANDIDATES.items():
        if options.onednn:  # may crash
            sample.save(tmp_path / "sample.npz")
            found[name] = parity.check(name, tmp_path / "b", tmp_path / "sample.npz", 1)
        else:
            found[name] = parity.measure(open_engine(read_bundle(tmp_path / "b"), options), sample)
    for name, entry in found.items():
        assert entry.get("max_score_difference", np.inf) <= parity.SCORE_TOLERANCE, name
        assert entry.get("max_map_difference", np.inf) <= parity.MAP_TOLERANCE, name
    ops = operators(tmp_path / "b")
    assert {"conv2d", "fetch"} <= ops
    assert not [op for op in ops if REFUSED.search(op)]
    if config.model.backbone not in TRANSFORMERS:  # theirs are over the last axis alone
        assert "layer_norm" not in ops
    if config.model.flow != "fastflow" or config.model.norm != "batch":
        kept = {"batch_norm", "batch_norm_"} & ops
        assert not kept or config.model.backbone == "mobilenet_v3_large"  # taps before the norm


def test_operators_are_found(tmp_path):
    graph = [{"#": "1.softplus"}, {"#": "0.split"}, {"#": "1.bilinear_interp"}]
    (tmp_path / "inference.json").write_text(json.dumps({"program": graph}))
    assert operators(tmp_path) == {"softplus", "bilinear_interp"}
    assert all(REFUSED.search(op) for op in operators(tmp_path))
