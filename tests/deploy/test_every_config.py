"""Every shipped configuration, small: scored, exported, and on every engine the same numbers."""

import importlib.util
import json
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import pytest
import yaml

from deploy import onnx_export, parity
from deploy.bundle import FORMAT, file_sha256, read_bundle
from deploy.engines import ENGINES, open_engine
from deploy.export_model import output_names, save_graph
from deploy.parity import CANDIDATES, Sample
from engine import session
from engine.evaluator import run
from metrics.threshold import fixed
from models.backbones import BACKBONES, efficientnet_b5
from models.backbones.base import Taps
from models.backbones.mcait import MultiScaleCait
from models.backbones.resnet import WideResNet50
from models.backbones.vit import CaitM48, CaitS24, DeitBaseDistilled384
from models.detector import Detector
from tests.small_run import REPO, photographs, settle, shake
from utils.config import Config, load

FILES = sorted((REPO / "configs").glob("*.yaml"))
SIDE = {"csflow": 128}  # 64 elsewhere: two positions a side on the coarsest level
# Fewer steps and channels for the same layers: tracing a graph takes the longest.
SMALLER = {
    "cflow": ["model.steps=2"], "csflow": ["model.hidden=16"],
    "fastflow": ["model.steps=2"], "uflow": ["model.steps=2"],
}  # fmt: skip
# What oneDNN or paddle2onnx refuse, or get wrong (measured with Paddle 3.3.1, paddle2onnx 2.1.0).
REFUSED = re.compile(r"softplus|interp|group_norm|amax|amin|leaky_relu|pixel_unshuffle")
NO_ONNX = [name for name in onnx_export.NEEDED if importlib.util.find_spec(name) is None]


class TinyDeit(DeitBaseDistilled384):
    taps: ClassVar[Taps] = {16: (2, 48)}
    image_size, width, heads = 96, 48, 3


class TinyCait(CaitM48):
    taps: ClassVar[Taps] = {16: (3, 48)}
    image_size, width, heads = 96, 48, 3


class TinyCoarse(CaitS24):
    taps: ClassVar[Taps] = {16: (2, 8)}
    image_size, width, heads = 48, 8, 2


class TinyPair(MultiScaleCait):
    taps: ClassVar[Taps] = {16: (0, 48), 32: (1, 8)}
    fine, coarse = TinyCait, TinyCoarse


class UnitVariance(paddle.nn.Layer):
    """A backbone whose maps are divided by constants: those of random weights may be huge."""

    def __init__(self, backbone: paddle.nn.Layer, images: paddle.Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = backbone.mean, backbone.std
        with paddle.no_grad():
            self.spreads = [float(level.std()) for level in backbone(images)]

    def forward(self, image: paddle.Tensor) -> list[paddle.Tensor]:
        levels = self.backbone(image)
        return [level / self.spreads[i] for i, level in enumerate(levels)]


TRANSFORMERS = {
    "deit_base_distilled_384": TinyDeit, "cait_m48_448": TinyCait, "mcait": TinyPair,
}  # fmt: skip


@pytest.fixture
def smaller(monkeypatch) -> None:
    """Give EfficientNet-B5 one block per stage: through 36 random ones, rounding grows 10⁵-fold.

    Make Wide-ResNet-50 an ordinary one, shrink the transformers, and time nothing for long.
    """
    stages = [(*shape, 1) for *shape, _ in efficientnet_b5.STAGES]
    monkeypatch.setattr(efficientnet_b5, "STAGES", stages)
    channels = {2: (1, 24), 4: (2, 40), 8: (3, 64), 16: (5, 176), 32: (6, 304)}
    monkeypatch.setattr(efficientnet_b5.EfficientNetB5, "taps", channels)
    monkeypatch.setattr(WideResNet50, "width", 64)
    for name, tiny in TRANSFORMERS.items():  # one input size only, and up to 356 M weights
        monkeypatch.setitem(BACKBONES, name, tiny)
    monkeypatch.setattr(parity, "TIMED_SECONDS", 0.0)


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def made(request, smaller) -> tuple[Config, Detector]:
    """A configuration and its detector, small, on random backbone weights, slightly shaken."""
    config = load(request.param)
    side = 96 if config.model.backbone in TRANSFORMERS else SIDE.get(config.model.flow, 64)
    config = load(request.param, [f"model.input_size={side}", *SMALLER[config.model.flow]])
    detector, _ = session.new_detector(config, allow_random=True)
    images = (paddle.to_tensor(photographs(3, side)) - detector.mean) / detector.std
    detector.backbone = UnitVariance(detector.backbone, images)
    shake(detector)
    settle(detector)
    detector.eval()
    return config, detector


def operators(folder: Path) -> set[str]:
    """Return the operators of a graph, without their dialect."""
    text = (folder / "inference.json").read_text(encoding="utf-8")
    return {name.partition(".")[2] for name in re.findall(r'"#":\s*"(1\.[a-z0-9_]+)"', text)}


def write_bundle(folder: Path, detector: Detector, outputs: list[str]) -> None:
    """Write graphs and a description that is enough to run them."""
    folder.mkdir()
    save_graph(detector, folder)
    if not NO_ONNX:
        onnx_export.convert(folder, outputs)
    threshold = fixed(0.5).to_dict()
    about = {
        "format": FORMAT, "input": {"size": list(detector.input_size), "resize": "pil"},
        "thresholds": {"image": threshold, "pixel": threshold}, "color_scale": [0, 1],
        "outputs": outputs, "files": {p.name: file_sha256(p) for p in folder.iterdir()},
    }  # fmt: skip
    (folder / "inference.yml").write_text(yaml.safe_dump(about), encoding="utf-8")


def engines_here() -> list[str]:
    """Return the candidates whose packages are installed; those of ONNX need its converter too."""
    names = []
    for name, options in CANDIDATES.items():
        found = importlib.util.find_spec(ENGINES[options.engine].package) is not None
        if found and (options.engine == "paddle" or not NO_ONNX):
            names.append(name)
    return names


@pytest.mark.slow
def test_parity(made: tuple[Config, Detector], tmp_path):
    config, detector = made
    images = photographs(8, config.model.input_size[0])
    with paddle.no_grad():
        levels = detector.features(paddle.to_tensor(images))
        detector.fit_scorer([[level[i : i + 1] for level in levels] for i in range(4)])
        alone = detector(paddle.to_tensor(images[1:2]))
    output = run(detector, images)
    assert output.maps.shape == (8, *config.model.input_size)
    assert np.ptp(output.scores) > 0
    assert np.ptp(output.maps) > 0
    assert len(output.evidence) == (len(levels) if config.nfa.method != "none" else 0)
    np.testing.assert_allclose(alone[1].numpy(), output.scores[1:2], rtol=1e-4)
    sample = Sample(images, output)
    write_bundle(tmp_path / "b", detector, output_names(output))
    found = {}
    for name in engines_here():
        if CANDIDATES[name].onednn:  # may crash
            sample.save(tmp_path / "sample.npz")
            found[name] = parity.check(name, tmp_path / "b", tmp_path / "sample.npz", 1)
        else:
            engine = open_engine(read_bundle(tmp_path / "b"), CANDIDATES[name])
            found[name] = parity.measure(engine, sample)
    for name, entry in found.items():
        assert entry.get("max_score_difference", np.inf) <= 1e-5, name
        assert entry.get("max_map_difference", np.inf) <= 1e-4, name
    check_operators(tmp_path / "b", config)


def check_operators(folder: Path, config: Config) -> None:
    """Check that nothing is left in a graph that engines refuse or that could be folded."""
    ops = operators(folder)
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
