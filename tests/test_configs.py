"""Every shipped configuration: built small, forwarded, exported; and the values of the papers."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import pytest

from deploy.export_model import save_graph
from engine import session
from models.backbones import BACKBONES
from models.backbones.base import Taps
from models.backbones.mcait import MultiScaleCait
from models.backbones.vit import CaitM48, CaitS24, DeitBaseDistilled384
from models.detector import Detector
from tests.small_run import REPO, photographs, settle, shake
from utils.config import Config, load
from utils.schema import CSFlowModel

FILES = sorted((REPO / "configs").glob("*.yaml"))
# Rounding grows on its way through 36 blocks of random weights.
TOLERANCE = {"efficientnet_b5": 5e-3}
SIDE = {"csflow": 128}  # 64 elsewhere: two positions a side on the coarsest level
# Fewer steps and channels for the same layers; seconds instead of minutes.
SMALLER = {"cflow": ["model.steps=2"], "csflow": ["model.hidden=16"], "fastflow": [], "uflow": []}


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


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def made(request, monkeypatch) -> tuple[Config, Detector]:
    """A configuration and its detector, small, on random backbone weights, slightly shaken."""
    config = load(request.param)
    side = SIDE.get(config.model.flow, 64)
    if config.model.backbone in TRANSFORMERS:  # one input size only, and up to 356 M weights
        side = 96
        monkeypatch.setitem(BACKBONES, config.model.backbone, TRANSFORMERS[config.model.backbone])
    small = [f"model.input_size={side}", *SMALLER[config.model.flow]]
    config = load(request.param, small)
    detector, _ = session.new_detector(config, allow_random=True)
    images = (paddle.to_tensor(photographs(3, side)) - detector.mean) / detector.std
    detector.backbone = UnitVariance(detector.backbone, images)
    shake(detector)
    settle(detector)
    detector.eval()
    return config, detector


@pytest.mark.slow
def test_it_runs_and_its_graph_says_the_same(made, tmp_path):
    config, detector = made
    tolerance = TOLERANCE.get(config.model.backbone, 1e-5)
    images = paddle.to_tensor(photographs(3, config.model.input_size[0]))
    with paddle.no_grad():
        expected = detector(images)
        alone = detector(images[1:2])
    levels = len(detector.flow.latent_channels) if config.nfa.method != "none" else 0
    assert len(expected) == 2 + levels
    assert expected[0].shape == [3, 1, *config.model.input_size]
    assert expected[1].shape == [3]
    np.testing.assert_allclose(alone[1].numpy(), expected[1].numpy()[1:2], rtol=10 * tolerance)
    save_graph(detector, tmp_path)
    graph = paddle.jit.load(str(tmp_path / "inference"))
    for count in (1, 3):
        for ours, theirs in zip(expected, graph(images[:count]), strict=True):
            ours, theirs = ours.numpy()[:count], theirs.numpy()
            assert np.isfinite(ours).all()
            scale = max(1.0, float(np.abs(ours).max()))
            np.testing.assert_allclose(theirs / scale, ours / scale, atol=tolerance)
    assert float(expected[0].std()) > 0


def config(name: str, category: str | None = None) -> Config:
    loaded = load(Path(REPO / f"configs/{name}.yaml"))
    return loaded.for_category(category) if category else loaded


def test_what_the_issue_of_flows_and_backbones_asks_for():
    """Flow, backbone and what sets the presets apart (specifications of the four methods)."""
    for name in ("cflow_wide_resnet50_2", "cflow_resnet18"):
        assert config(name).model.padding == "reflect"
    assert config("cflow_mobilenet_v3_large").model.before_norm
    assert config("csflow_efficientnet_b5").model.padding == "tf_static"
    assert config("csflow_efficientnet_b5_anomalib").model.padding == "symmetric"
    korean = config("csflow_efficientnet_b5_korean")
    assert isinstance(korean.model, CSFlowModel)
    assert (korean.model.blocks, korean.model.hidden, korean.model.score) == (1, 512, "std")
    assert korean.train.select_on == "test"
    others = [load(file) for file in FILES if "korean" not in file.stem]
    assert {other.train.select_on for other in others} == {"holdout"}
    assert not any(other.train.best_by for other in others)


def test_input_sizes_of_cflow():
    sizes = {
        512: [
            "bottle",
            "carpet",
            "grid",
            "leather",
            "screw",
            "tile",
            "toothbrush",
            "wood",
            "zipper",
        ]
    }
    sizes |= {256: ["cable", "capsule", "hazelnut", "metal_nut", "pill"], 128: ["transistor"]}
    for size, categories in sizes.items():
        for category in categories:
            found = config("cflow_wide_resnet50_2", category).model.input_size
            assert found == (size, size), category


def test_settings_by_category_of_uflow():
    assert len(config("uflow_mcait").per_category) == 15
    for category, expected in {
        "carpet": (200, 13, 3.163419554150971e-5), "tile": (200, 30, 6.045754779719109e-3),
        "hazelnut": (500, 21, 1.3268898640895934e-3), "transistor": (400, 20, 1.12129043027424e-3),
        "zipper": (200, 24, 4.55246818236177e-5),
    }.items():  # fmt: skip
        train = config("uflow_mcait", category).train
        assert (train.epochs, train.batch_size, train.lr) == expected


@pytest.mark.parametrize(
    ("name", "flow_parameters"),
    [
        ("cflow_resnet18", 8_620_032),
        ("cflow_mobilenet_v3_large", 2_557_440),
        ("csflow_efficientnet_b5_korean", 66_157_734),
        ("uflow_resnet18", 1_479_880 + 2 * (64 * 64 * 64 + 128 * 32 * 32 + 256 * 16 * 16)),
    ],
)
@pytest.mark.slow
def test_parameter_counts_of_the_papers(name, flow_parameters):
    """U-Flow's includes a layer norm over C, H and W per level."""
    detector, _ = session.new_detector(config(name), allow_random=True)
    trained = [p for p in detector.parameters() if not p.stop_gradient]
    assert sum(int(p.size) for p in trained) == flow_parameters
