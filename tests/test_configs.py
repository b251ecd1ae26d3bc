"""Every shipped configuration against the values of the papers."""

from dataclasses import asdict
from pathlib import Path

import paddle
import pytest

from models import build_detector
from tests.small_run import REPO
from utils.config import Config, load
from utils.schema import CSFlowModel

FILES = sorted((REPO / "configs").glob("*.yaml"))


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
def test_parameter_counts_of_the_papers(name, flow_parameters):
    """U-Flow's includes a layer norm over C, H and W per level."""
    with paddle.LazyGuard():  # shapes without values
        detector = build_detector(asdict(config(name).model))
    trained = [p for p in detector.parameters() if not p.stop_gradient]
    assert sum(int(p.size) for p in trained) == flow_parameters
