"""EfficientNet-B5, CS-Flow's image sizes, and the padding and tap options of other backbones."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from paddle import nn
from safetensors.numpy import save_file

from models.backbones import Backbone, build_backbone
from models.backbones.efficientnet_b5 import (
    Block,
    BlockShape,
    EfficientNetB5,
    Padding,
    SqueezeExcite,
    block_shapes,
    edges,
    own_names,
)
from models.backbones.multiscale import MultiScale
from models.backbones.weights import load_weights
from utils.errors import UserError

Arrays = dict[str, np.ndarray]
GoldenReader = Callable[[str], Arrays]
PADDINGS: tuple[Padding, ...] = ("tf_static", "symmetric")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def perturb(layer: nn.Layer, seed: int = 0) -> Arrays:
    """Give all parameters and statistics random values, variances positive; return them."""
    rng = np.random.default_rng(seed)
    for key, tensor in layer.state_dict().items():
        value = 0.5 * rng.standard_normal(tensor.shape)
        if key.endswith("_variance"):
            value = 0.2 + value**2
        tensor.set_value(value.astype(np.float32))
    layer.eval()
    return {key: t.numpy().astype(np.float64) for key, t in layer.state_dict().items()}


def run(layer: nn.Layer, x: np.ndarray) -> list[np.ndarray]:
    with paddle.no_grad():
        output = layer(paddle.to_tensor(x))
    return [o.numpy() for o in (output if isinstance(output, list) else [output])]


def assert_close(value: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def depthwise(x: np.ndarray, kernel: np.ndarray, pad: tuple[int, int], stride: int) -> np.ndarray:
    """Convolve every channel of (B, C, H, W) with its own (C, 1, k, k)."""
    padded = np.pad(x, ((0, 0), (0, 0), pad, pad))
    windows = sliding_window_view(padded, kernel.shape[2:], axis=(2, 3))
    return np.einsum("bchwij,cij->bchw", windows[:, :, ::stride, ::stride], kernel[:, 0])


def pointwise(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.einsum("bchw,oc->bohw", x, kernel[:, :, 0, 0])


def normalise(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    leaves = ("weight", "bias", "_mean", "_variance")
    weight, bias, mean, variance = (state[f"{name}.{leaf}"][:, None, None] for leaf in leaves)
    return (x - mean) / np.sqrt(variance + 1e-3) * weight + bias


def gated(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    means = x.mean((2, 3))
    inner = swish(means @ state[f"{name}reduce.weight"][:, :, 0, 0].T + state[f"{name}reduce.bias"])
    gate = inner @ state[f"{name}expand.weight"][:, :, 0, 0].T + state[f"{name}expand.bias"]
    return x / (1 + np.exp(-gate))[:, :, None, None]


def block(x: np.ndarray, state: Arrays, pad: tuple[int, int], stride: int) -> np.ndarray:
    y = x
    if "expand.conv.weight" in state:
        y = swish(normalise(pointwise(x, state["expand.conv.weight"]), state, "expand.norm"))
    y = depthwise(y, state["depthwise.conv.weight"], pad, stride)
    y = gated(swish(normalise(y, state, "depthwise.norm")), state, "squeeze.")
    y = normalise(pointwise(y, state["project.conv.weight"]), state, "project.norm")
    return x + y if stride == 1 and x.shape == y.shape else y


# expansion, outputs (input: 6 channels), kernel, stride, size the padding is for, (zeros of each)
CASES = [
    (1, 4, 3, 1, 228, (1, 1), (1, 1)),  # like block 0
    (1, 6, 3, 1, 228, (1, 1), (1, 1)),
    (6, 4, 3, 2, 228, (0, 1), (1, 1)),
    (6, 4, 5, 2, 114, (1, 2), (2, 2)),
    (6, 4, 3, 2, 57, (1, 1), (1, 1)),
    (6, 6, 5, 1, 29, (2, 2), (2, 2)),
]


@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize("case", CASES)
def test_block_equals_numpy(case: tuple, mode: Padding) -> None:
    expansion, outputs, kernel, stride, size, static, symmetric = case
    shape = BlockShape(1, 0, 6, outputs, kernel, stride, expansion, size)
    layer = Block(shape, mode)
    state = perturb(layer)
    x = noise(2, 6, 12, 10)
    pad = static if mode == "tf_static" else symmetric
    assert_close(run(layer, x)[0], block(x, state, pad, stride))
    assert layer.residual == (stride == 1 and outputs == 6)


def test_squeeze_and_excitation_equals_numpy() -> None:
    layer = SqueezeExcite(8, 3)
    state = perturb(layer)
    x = noise(2, 8, 5, 7)
    assert_close(run(layer, x)[0], gated(x, state, ""))


def test_static_padding_is_that_of_456_pixels() -> None:
    """Compare with the table of the CS-Flow specification."""
    assert edges("tf_static", 456, 3, 2) == (0, 1)  # stem
    found = {
        shape.stage: (shape.kernel, edges("tf_static", shape.size, shape.kernel, shape.stride))
        for shape in block_shapes()
        if shape.stride == 2
    }
    assert found == {2: (3, (0, 1)), 3: (5, (1, 2)), 4: (3, (1, 1)), 6: (5, (2, 2))}
    for shape in block_shapes():
        half = shape.kernel // 2
        assert edges("symmetric", shape.size, shape.kernel, shape.stride) == (half, half)
        if shape.stride == 1:
            assert edges("tf_static", shape.size, shape.kernel, 1) == (half, half)


@pytest.mark.parametrize("mode", PADDINGS)
def test_network_pads_by_that_table(mode: Padding) -> None:
    """Pad in numpy before every convolution that pads, and compare its output."""
    backbone = EfficientNetB5([32], mode)
    load_weights(backbone, allow_random=True)
    static = {0: (0, 1), 4: (0, 1), 9: (1, 2), 14: (1, 1), 28: (2, 2)}  # steps of stride 2
    compared = 0
    x = paddle.to_tensor(noise(1, 3, 64, 96))
    for index, step in enumerate(backbone.steps()):
        conv = step.conv if index == 0 else step.depthwise.conv
        weight, half = conv.weight, conv.weight.shape[2] // 2
        y = x if index == 0 else step.expand(x)
        pad = static.get(index, (half, half)) if mode == "tf_static" else (half, half)
        padded = paddle.to_tensor(np.pad(y.numpy(), ((0, 0), (0, 0), pad, pad)))
        groups = y.shape[1] // weight.shape[1]
        stride = 2 if index in static else 1
        expected = F.conv2d(padded, weight, stride=stride, groups=groups)
        assert_close(conv(y).numpy(), expected.numpy())
        compared += 1
        x = step(x)
    assert compared == 37


def test_lite0_padding_follows_the_input() -> None:
    """Hold "same" padding at sizes of both parities against numpy, for k3 and k5."""
    lite0 = build_backbone("efficientnet_lite0", [8])
    perturb(lite0)
    for step, kernel in ((2, 3), (4, 5)):
        conv = lite0.steps()[step].depthwise.conv
        for size in (12, 13):
            x = noise(1, conv.weight.shape[0], size, size)
            total = (-(-size // 2) - 1) * 2 + kernel - size
            expected = depthwise(x, conv.weight.numpy(), (total // 2, total - total // 2), 2)
            assert_close(run(conv, x)[0], expected)


@pytest.mark.parametrize("mode", PADDINGS)
def test_shapes_and_sizes(mode: str) -> None:
    backbone = build_backbone("efficientnet_b5", [2, 4, 8, 16, 32], padding=mode)
    load_weights(backbone, allow_random=True)
    assert backbone.channels == [24, 40, 64, 176, 304]
    shapes = [feature.shape for feature in run(backbone, noise(1, 3, 64, 128))]
    assert shapes == [(1, c, 64 // s, 128 // s) for s, c in zip(
        backbone.strides, backbone.channels, strict=True)]  # fmt: skip
    assert len(backbone.blocks) == 36
    squeezed = [layer.reduce.weight.shape[0] for layer in (b.squeeze for b in backbone.blocks)]
    assert (squeezed[0], squeezed[1], squeezed[3], squeezed[35]) == (12, 6, 6, 76)


def test_parameters_add_up_to_the_published_network() -> None:
    """Torchvision's efficientnet_b5 has 30,389,784 parameters in 39 blocks."""
    backbone = EfficientNetB5([32])
    state = backbone.state_dict()
    learned = {key: t for key, t in state.items() if not key.endswith(("_mean", "_variance"))}
    count = sum(math.prod(t.shape) for t in learned.values())
    rest = 512 * 2048 + 2 * 2048 + 2048 * 1000 + 1000  # head convolution, its norm, classifier
    for inputs in (304, 512, 512):  # stage 7: expansion 6, k3, squeeze of a quarter
        width, squeezed = 6 * inputs, inputs // 4
        rest += inputs * width + 2 * width + 9 * width + 2 * width
        rest += 2 * width * squeezed + squeezed + width + width * 512 + 2 * 512
    assert count + rest == 30_389_784
    assert len(list(block_shapes())) == 39


def test_paddings_differ_at_every_tap_and_take_the_same_weights() -> None:
    static, symmetric = (EfficientNetB5([4, 32], padding) for padding in PADDINGS)
    load_weights(static, allow_random=True)
    load_weights(symmetric, allow_random=True)
    assert static.weight_hash == symmetric.weight_hash
    for a, b in zip(
        run(static, noise(1, 3, 64, 64)), run(symmetric, noise(1, 3, 64, 64)), strict=True
    ):
        assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()
    with pytest.raises(UserError, match="padding 'same' of efficientnet_b5 is not one of tf_st"):
        build_backbone("efficientnet_b5", [32], padding="same")


NAMES = [
    # efficientnet_pytorch, PaddleClas, torchvision, here
    ("_conv_stem.weight", "_ef._conv_stem._conv._conv._conv.weight", "features.0.0.weight",
     "stem.conv.weight"),
    ("_bn0._mean", "_ef._conv_stem._conv._bn._mean", "features.0.1._mean", "stem.norm._mean"),
    ("_blocks.0._depthwise_conv.weight", "_ef._blocks.0.._dcn._conv._conv._conv.weight",
     "features.1.0.block.0.0.weight", "blocks.0.depthwise.conv.weight"),
    ("_blocks.1._se_expand.bias", "_ef.block.1.._se._conv2._conv.bias",
     "features.1.1.block.1.fc2.bias", "blocks.1.squeeze.expand.bias"),
    ("_blocks.2._bn2.bias", "_ef.block.2.._pcn._conv._bn.bias",
     "features.1.2.block.2.1.bias", "blocks.2.project.norm.bias"),
    ("_blocks.3._expand_conv.weight", "_ef._blocks.3.._ecn._conv._conv._conv.weight",
     "features.2.0.block.0.0.weight", "blocks.3.expand.conv.weight"),
    ("_blocks.3._bn1._variance", "_ef._blocks.3.._dcn._conv._bn._variance",
     "features.2.0.block.1.1._variance", "blocks.3.depthwise.norm._variance"),
    ("_blocks.20._se_reduce.weight", "_ef._blocks.20.._se._conv1._conv.weight",
     "features.5.0.block.2.fc1.weight", "blocks.20.squeeze.reduce.weight"),
    ("_blocks.35._bn0.weight", "_ef.block.35.._ecn._conv._bn.weight",
     "features.6.8.block.0.1.weight", "blocks.35.expand.norm.weight"),
    ("_blocks.35._project_conv.weight", "_ef.block.35.._pcn._conv._conv._conv.weight",
     "features.6.8.block.3.0.weight", "blocks.35.project.conv.weight"),
]  # fmt: skip
HEADS = [
    ["_conv_head.weight", "_bn1.weight", "_fc.bias", "_blocks.36._bn0.weight"],
    ["_conv._conv._conv.weight", "_conv._bn.bias", "_ef._blocks.36.._ecn._conv._bn.bias"],
    ["features.8.0.weight", "classifier.1.bias", "features.7.2.block.2.fc1.bias"],
]  # fmt: skip


@pytest.mark.parametrize("column", range(3))
def test_names_of_other_projects(column: int, tmp_path: Path) -> None:
    backbone = EfficientNetB5([32])
    state = perturb(backbone)
    for names in NAMES:
        assert list(backbone.translate({names[column]: np.ones(1)})) == [names[3]]
    # All names of this project: those of this form are at this place among each three.
    marks = (r"_blocks.", "_ef.", "features.")
    foreign = {
        own: name
        for name, own in own_names().items()
        if name.startswith(marks[column]) or (column == 0 and name in ("_conv_stem", "_bn0"))
    }
    arrays = {}
    for key, array in state.items():
        layer, _, leaf = key.rpartition(".")
        leaf = {"_mean": "running_mean", "_variance": "running_var"}.get(leaf, leaf)
        arrays[f"{foreign[layer]}.{leaf}"] = array.astype(np.float32)
    assert len(arrays) == len(state)
    for key in HEADS[column]:
        arrays[key] = np.zeros(1, np.float32)
    save_file(arrays, tmp_path / "a.safetensors")
    loaded = EfficientNetB5([32])
    load_weights(loaded, tmp_path / "a.safetensors")
    for key, tensor in loaded.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[key].astype(np.float32))

    first, *_ = [key for key in arrays if key.endswith("bias")]
    arrays["other"] = arrays.pop(first)
    save_file(arrays, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"missing (stem|blocks)\.\S+bias; unknown other$"):
        load_weights(loaded, tmp_path / "b.safetensors")


def test_nothing_trains() -> None:
    backbone = MultiScale(EfficientNetB5([8]))
    perturb(backbone)
    outer = nn.LayerList([backbone])
    state = {key: t.numpy().copy() for key, t in backbone.state_dict().items()}
    before = run(backbone, noise(2, 3, 64, 64))
    outer.train()
    for feature, expected in zip(run(backbone, noise(2, 3, 64, 64)), before, strict=True):
        np.testing.assert_array_equal(feature, expected)
    for key, tensor in backbone.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[key])
    assert all(parameter.stop_gradient for parameter in backbone.parameters())


def scaled_lite0() -> MultiScale:
    inner = build_backbone("efficientnet_lite0", [32], last_block=14)
    return MultiScale(inner)


def test_image_sizes_are_those_of_nearest_resizing() -> None:
    backbone = scaled_lite0()
    load_weights(backbone)
    image = noise(2, 3, 128, 256)
    assert (backbone.strides, backbone.channels) == ([32, 64, 128], [192, 192, 192])
    for step, feature in zip((1, 2, 4), run(backbone, image), strict=True):
        small = F.interpolate(paddle.to_tensor(image), size=[128 // step, 256 // step]).numpy()
        assert feature.shape == (2, 192, 4 // step, 8 // step)
        np.testing.assert_array_equal(feature, run(backbone.backbone, small)[0])
        np.testing.assert_array_equal(small[:, :, 1, 1], image[:, :, step, step])


def test_several_sizes_share_name_normalisation_and_weights() -> None:
    backbone = scaled_lite0()
    inner = build_backbone("efficientnet_lite0", [32], last_block=14)
    info, expected = load_weights(backbone), load_weights(inner)
    assert info == expected
    assert backbone.weight_hash == backbone.backbone.weight_hash == inner.weight_hash != ""
    assert (backbone.name, backbone.mean, backbone.std) == (inner.name, inner.mean, inner.std)
    assert MultiScale(EfficientNetB5([32]), 2).mean == (0.485, 0.456, 0.406)


def test_input_size_of_several_sizes() -> None:
    backbone = scaled_lite0()
    backbone.check_input_size(768, 128)
    for size, nearest in ((96, 128), (512 + 32, 512)):
        with pytest.raises(UserError, match=f"multiples of 128, like {nearest} instead of {size}"):
            backbone.check_input_size(256, size)
    with paddle.LazyGuard():
        cait = MultiScale(build_backbone("cait_s24_224"))
    with pytest.raises(UserError, match="cait_s24_224"):
        cait.check_input_size(256, 256)


def test_several_sizes_need_one_stride() -> None:
    with pytest.raises(UserError, match=r"strides \[8, 16\] must be one only"):
        MultiScale(build_backbone("efficientnet_lite0", [8, 16]))


def test_lite0_tapped_at_block_14(golden: GoldenReader) -> None:
    backbone = build_backbone("efficientnet_lite0", [16, 32], last_block=14)
    assert load_weights(backbone).origin == "bundled"
    assert (backbone.channels, len(backbone.blocks)) == ([112, 192], 15)
    reference = golden("backbone_efflite0_real")
    for feature, name in zip(run(backbone, reference["x"]), ("block10", "block14"), strict=True):
        assert_close(feature, reference[name])
    assert build_backbone("efficientnet_lite0", [32]).channels == [320]
    with pytest.raises(UserError, match="last_block 13 of efficientnet_lite0 is not one of 14, 15"):
        build_backbone("efficientnet_lite0", [32], last_block=13)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 17), ("wide_resnet50_2", 17)])
def test_reflecting_resnet(name: str, count: int) -> None:
    """Pad in numpy before every convolution that pads, and compare its output."""
    backbone = build_backbone(name, [4, 32], padding="reflect")
    zeros = build_backbone(name, [4])
    load_weights(backbone, allow_random=True)
    load_weights(zeros, allow_random=True)
    assert list(zeros.state_dict()) == list(backbone.state_dict())[: len(zeros.state_dict())]
    seen: list[int] = []

    def compare(layer: nn.Conv2D, inputs: tuple[paddle.Tensor], output: paddle.Tensor) -> None:
        edge = layer.weight.shape[2] // 2
        pad = ((0, 0), (0, 0), (edge, edge), (edge, edge))
        x = paddle.to_tensor(np.pad(inputs[0].numpy(), pad, mode="reflect"))
        stride = inputs[0].shape[2] // output.shape[2]
        assert_close(output.numpy(), F.conv2d(x, layer.weight, stride=stride).numpy())
        seen.append(layer.weight.shape[2])

    for layer in backbone.sublayers():
        if isinstance(layer, nn.Conv2D) and layer.weight.shape[2] > 1:
            layer.register_forward_post_hook(compare)
    image = noise(1, 3, 96, 96)
    fine, coarse = run(backbone, image)
    assert seen == [7] + [3] * (count - 1)
    assert coarse.shape == (1, backbone.channels[1], 3, 3)
    difference = np.abs(fine - run(zeros, image)[0])
    assert difference[:, :, 8:-8, 8:-8].max() < 1e-5 * np.abs(fine).max() < difference.max()
    with pytest.raises(UserError, match=f"padding 'mirror' of {name} is not one of zeros, refl"):
        build_backbone(name, [4], padding="mirror")


EXPORT = """
import sys
import numpy as np, paddle
from paddle.inference import Config, create_predictor
from paddle.static import InputSpec
from tests.models import test_backbones_b5 as cases
folder, case = sys.argv[1:]
backbone = cases.EXPORTED[case]()
cases.load_weights(backbone, allow_random=True)
spec = [InputSpec([None, 3, 128, 256], "float32", "image")]
static = paddle.jit.to_static(backbone, input_spec=spec, full_graph=True)
paddle.jit.save(static, folder + "/inference")
for mode, tolerance in (("plain", 3e-6), ("onednn", 1e-5)):
    config = Config(folder + "/inference.json", folder + "/inference.pdiparams")
    config.disable_gpu()
    config.enable_mkldnn() if mode == "onednn" else config.disable_mkldnn()
    predictor = create_predictor(config)
    for batch in (1, 3):
        image = np.random.default_rng(batch).standard_normal((batch, 3, 128, 256))
        image = paddle.to_tensor(image.astype("float32"))
        for a, b in zip(backbone(image), predictor.run([image]), strict=True):
            assert a.shape == b.shape
            error = float((a - b).abs().max() / a.abs().max())
            assert error < tolerance, (mode, error)
"""
EXPORTED: dict[str, Callable[[], Backbone]] = {
    "b5 static": lambda: MultiScale(EfficientNetB5([8])),
    "b5 symmetric": lambda: EfficientNetB5([4, 32], "symmetric"),
    "lite0 block 14": scaled_lite0,
    "resnet18 reflect": lambda: build_backbone("resnet18", [4, 8, 16, 32], padding="reflect"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_exported_graph_equals_eager(tmp_path: Path, repo: Path, case: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), case],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
