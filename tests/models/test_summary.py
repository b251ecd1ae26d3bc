"""What `train.py --summary` prints, against counts by hand and known networks."""

import dataclasses
from typing import Any

import paddle
import pytest
from paddle.vision.models import mobilenet_v2, resnet18

import train
from engine import session
from models import summary
from models.detector import Detector
from models.flows.fastflow import FastFlow
from models.references import REFERENCES, published_count
from models.summary import Cost, Summary, render, summarise
from tests.small_run import REPO, tiny_config
from utils.config import load
from utils.schema import MODEL_SECTIONS


def counted(layer: paddle.nn.Layer, side: int) -> int:
    """Return the multiply-adds of a network on one image."""
    found: list[int] = []
    layer.eval()
    with paddle.no_grad(), summary._tapped(found.append):
        layer(paddle.rand([1, 3, side, side]))
    return sum(found)


@pytest.mark.parametrize(
    ("build", "macs"),
    [
        (resnet18, 1_814_073_344),  # convolutions 1,813,561,344 and 512·1,000
        (mobilenet_v2, 300_774_272),  # depthwise ones among them (torchvision's documentation)
    ],
)
def test_known_networks(build: Any, macs: int) -> None:
    assert counted(build(), 224) == macs


def test_products_by_hand_and_functions_put_back() -> None:
    before = paddle.matmul, paddle._C_ops.matmul
    found: list[int] = []
    with summary._tapped(found.append):
        paddle.matmul(paddle.rand([7, 2, 3]), paddle.rand([3, 5]))
        paddle.matmul(paddle.rand([3, 2]), paddle.rand([5, 3]), transpose_x=True, transpose_y=True)
        paddle.nn.Linear(4, 6)(paddle.rand([2, 4]))
        paddle.nn.Conv2D(8, 4, 3, groups=2, padding=1)(paddle.rand([1, 8, 5, 5]))
    assert found == [7 * 2 * 5 * 3, 2 * 5 * 3, 2 * 6 * 4, 25 * 4 * (8 // 2) * 9]
    assert (paddle.matmul, paddle._C_ops.matmul) == before
    with pytest.raises(RuntimeError), summary._tapped(found.append):
        raise RuntimeError
    assert paddle._C_ops.matmul is before[1]


@pytest.fixture(scope="module")
def fastflow() -> Summary:
    """FastFlow at 64 × 64 with two steps per level, on levels of 24, 40 and 112 channels."""
    return summarise(session.build_from(tiny_config()))


def test_a_flow_by_hand(fastflow: Summary) -> None:
    assert list(fastflow.parts) == [
        "backbone", "norms", "flow, level 1", "flow, level 2", "flow, level 3", "scorer",
    ]  # fmt: skip
    for name, channels, side in (("1", 24, 16), ("2", 40, 8), ("3", 112, 4)):
        half = channels // 2
        convolutions = 9 * half * half + 9 * half * channels  # 3×3, half to half to whole
        cost = fastflow.parts[f"flow, level {name}"]
        assert cost.macs == 2 * side**2 * (convolutions + channels * channels)
        assert cost.parameters == cost.trained
        assert cost.trained == 2 * (convolutions + half + channels + 2 * channels)
        permutations = 2 * channels * 8  # integers of 8 bytes
        assert cost.weights == 4 * cost.parameters + permutations
    affine = 2 * (24 * 16**2 + 40 * 8**2 + 112 * 4**2)  # weight and bias of the layer norms
    assert fastflow.parts["norms"].trained == affine
    rows = sum(side * (64 * 64 + 64 * side) for side in (16, 8, 4))  # both axes of each map
    assert fastflow.parts["scorer"].macs == rows


def test_totals(fastflow: Summary) -> None:
    detector = session.build_from(tiny_config())
    trained = sum(int(p.size) for p in detector.parameters() if not p.stop_gradient)
    statistics = sum(
        int(p.size)
        for name, p in detector.named_parameters()
        if name.endswith(("_mean", "_variance"))
    )
    assert fastflow.total.trained == trained
    assert fastflow.total.parameters + statistics == sum(int(p.size) for p in detector.parameters())
    assert fastflow.total.weights == sum(
        int(t.size) * int(t.element_size()) for t in detector.state_dict().values()
    )
    assert fastflow.parts["backbone"].trained == 0
    parts = fastflow.parts.values()
    assert fastflow.total.macs == sum(cost.macs for cost in parts)
    assert fastflow.total.inference == max(cost.inference for cost in parts)
    levels = [cost for name, cost in fastflow.parts.items() if "level" in name]
    assert fastflow.flow.training == sum(cost.training for cost in levels)


def test_memory_grows_with_the_maps(fastflow: Summary) -> None:
    """Four times the positions: four times what is kept, once the maps outweigh the rest."""
    large = summarise(session.build_from(tiny_config("model.input_size=128")))
    for name in ("flow, level 1", "flow, level 2"):
        assert 3.6 < large.parts[name].training / fastflow.parts[name].training < 4.4
    assert 3 < large.total.inference / fastflow.total.inference < 4.4
    assert large.parts["flow, level 1"].weights == fastflow.parts["flow, level 1"].weights
    latents = 4 * 24 * 32 * 32  # bytes of one map of level 1
    assert large.parts["flow, level 1"].training > 2 * 4 * latents  # two steps, several maps each
    assert large.parts["backbone"].training < latents  # frozen: nothing but its own output


def test_memory_of_a_layer_by_hand() -> None:
    layer = paddle.nn.LayerList([paddle.nn.Linear(10, 1000), paddle.nn.Linear(1000, 10)])
    parts, layers = {"both": Cost()}, {"both": list(layer)}
    x = paddle.rand([1000, 10])
    with (
        paddle.no_grad(),
        summary._counted(parts | {summary.OTHER: Cost()}, layers, summary._in_use()),
    ):
        layer[1](layer[0](x))
    assert parts["both"].macs == 2 * 1000 * 1000 * 10
    # 1000 × 1000 floats, before and after the bias
    assert 8_000_000 <= parts["both"].inference < 8_200_000
    with summary._kept(parts, layers):
        kept = layer[1](layer[0](x))
    assert kept.shape == [1000, 10]
    assert 4_000_000 <= parts["both"].training < 4_200_000


@pytest.mark.slow
@pytest.mark.parametrize("flow", MODEL_SECTIONS)
def test_every_method_is_counted(flow: str) -> None:
    """In eager mode, folded, nothing is left out that the static graph computes."""
    small = ["model.input_size=64", "model.steps=2"]
    if flow == "csflow":
        small = ["model.input_size=128", "model.blocks=1"]
    config = load(REPO / f"configs/{flow}_efficientnet_lite0.yaml", small)
    found = summarise(session.build_from(config))
    assert all(cost.trained and cost.macs for name, cost in found.parts.items() if "flow" in name)
    detector = session.build_from(config)
    detector.eval()
    detector.flow.fold()
    assert found.total.macs == of_static_graph(detector)


def of_static_graph(detector: Detector) -> int:
    """Return the multiply-adds of the traced program, read off the shapes of its operations."""
    spec = paddle.static.InputSpec([1, 3, *detector.input_size], "float32", "image")
    static = paddle.jit.to_static(detector, input_spec=[spec], full_graph=True)
    total = 0
    for op in static.forward.concrete_program.main_program.global_block().ops:
        kind = op.name().removeprefix("pd_op.")
        if "conv2d" in kind:
            total += _size(op.result(0).shape) * _size(op.operand(1).source().shape[1:])
        elif kind == "matmul":
            last = -2 if op.attrs()["transpose_x"] else -1
            total += _size(op.result(0).shape) * op.operand(0).source().shape[last]
    return total


def _size(shape: list[int]) -> int:
    assert min(shape) > 0
    return int(paddle.to_tensor(shape).prod())


def test_products_between_the_parts_have_a_row() -> None:
    class Turned(FastFlow):
        def forward(self, features):
            return super().forward([paddle.matmul(x, paddle.eye(x.shape[3])) for x in features])

    detector = session.build_from(tiny_config())
    detector.flow.__class__ = Turned
    found = summarise(detector)
    assert found.parts["other"].macs == 24 * 16**3 + 40 * 8**3 + 112 * 4**3


def test_published_counts() -> None:
    def stated(name: str, *overrides: str) -> str:
        model = load(REPO / f"configs/{name}.yaml", overrides).model
        return published_count(dataclasses.asdict(model))

    assert stated("resnet18") == "4.9 M (paper)"
    assert stated("uflow_mcait") == "12,216,480 (official code)"
    assert stated("csflow_efficientnet_b5_korean") == "66,157,734 (Korean fork)"
    assert stated("csflow_efficientnet_b5", "model.blocks=3") == ""
    assert stated("fastflow_efficientnet_lite0") == ""
    for entry in REFERENCES:  # a setting that no longer exists would never match
        fields = {field.name for field in dataclasses.fields(MODEL_SECTIONS[entry.flow])}
        assert set(entry.settings) <= fields


@pytest.mark.parametrize("name", ["cflow_resnet18", "uflow_resnet18", "cflow_mobilenet_v3_large"])
def test_counts_equal_the_published_ones(name: str) -> None:
    config = load(REPO / f"configs/{name}.yaml", ["model.input_size=64"])
    found = summarise(session.build_from(config))
    stated = published_count(dataclasses.asdict(config.model))
    assert stated == f"{found.flow.trained:,} (official code)"


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    """It needs neither weights nor images, and follows the values of a category."""
    monkeypatch.setenv("HOME", str(tmp_path))
    preset = str(REPO / "configs/cflow_mobilenet_v3_large.yaml")
    options = ["--data", str(tmp_path / "none"), "-o", "model.steps=1"]
    assert train.main(["-cfg", preset, "-cat", "transistor", "cable", "--summary", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("Input")] == [
        "Input 128×128, one image, on the CPU. 1 MB is 10^6 bytes of Paddle's tensors.",
        "Input 256×256, one image, on the CPU. 1 MB is 10^6 bytes of Paddle's tensors.",
    ]
    assert out.count("| total ") == 2
    assert not list(tmp_path.iterdir())


def test_the_table(fastflow: Summary) -> None:
    lines = render(fastflow, dataclasses.asdict(tiny_config().model)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert [row.split("|")[1].strip() for row in table] == [
        "part", "-" * 15, "backbone", "norms", "flow, level 1", "flow, level 2", "flow, level 3",
        "flow, all", "scorer", "total",
    ]  # fmt: skip
    assert f" {fastflow.total.trained:,} |" in table[-1]
    assert f"take {12 * fastflow.total.trained / 1e6:,.1f} MB more" in lines[-1]
