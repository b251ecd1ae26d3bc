"""Frozen backbones: features equal the reference, shapes, taps, and that nothing ever trains."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.vision.models import resnet18, wide_resnet50_2

from models.backbones import BACKBONES, Backbone, build_backbone
from models.backbones.weights import load_weights
from utils.errors import UserError

STRIDES = [2, 4, 8, 16, 32]
CHANNELS = {
    "efficientnet_lite0": [16, 24, 40, 112, 320],
    "resnet18": [64, 64, 128, 256, 512],
    "wide_resnet50_2": [64, 256, 512, 1024, 2048],
    "mobilenet_v2": [16, 24, 32, 96, 320],
    "mobilenet_v3_large": [16, 24, 40, 112, 160],
}
SMALL = [name for name in CHANNELS if name != "wide_resnet50_2"]
VARIANTS = [*SMALL, "mobilenet_v3_large before_norm"]
GOLDEN = Path(__file__).parents[1] / "golden" / "efficientnet_lite0.npz"
GoldenReader = Callable[[str], dict[str, np.ndarray]]


def random_backbone(name: str, strides: list[int] | None = None, **options: bool) -> Backbone:
    backbone = build_backbone(name, strides, **options)
    load_weights(backbone, allow_random=True)
    return backbone


def run(layer: nn.Layer, image: np.ndarray) -> list[np.ndarray]:
    with paddle.no_grad():
        return [feature.numpy() for feature in layer(paddle.to_tensor(image))]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def assert_close(value: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    backbone = build_backbone("efficientnet_lite0", STRIDES)
    assert load_weights(backbone).origin == "bundled"
    return backbone


@pytest.mark.parametrize("prefix", ["", "odd_"])
def test_efficientnet_features_equal_reference(
    lite0: Backbone, golden: GoldenReader, prefix: str
) -> None:
    reference = golden("backbone_efflite0_real")
    for i, feature in enumerate(run(lite0, reference[f"{prefix}x"])):
        assert_close(feature, reference[f"{prefix}feat{i}"])


def test_every_efficientnet_block_equals_reference(lite0: Backbone, golden: GoldenReader) -> None:
    reference = golden("backbone_efflite0_real")
    x = paddle.to_tensor(reference["x"])
    for name, step in zip(["stem", *(f"block{i}" for i in range(16))], lite0.steps(), strict=True):
        x = step(x)
        assert_close(x.numpy(), reference[name])


def test_efficientnet_normalisation_equals_reference(lite0: Backbone, golden: GoldenReader) -> None:
    reference = golden("backbone_efflite0_real")
    photo = reference["china_uint8_224"].transpose(2, 0, 1)[None] / np.float32(255)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (lite0.mean, lite0.std))
    feature = run(lite0, (photo - mean) / std)[3]
    assert_close(feature.mean((2, 3)), reference["china_feat3_mean_per_channel"])


def test_efficientnet_features_have_not_moved(lite0: Backbone) -> None:
    """Hold features of an odd-sized image as they were when all of the above passed."""
    with np.load(GOLDEN) as file:
        for stride, feature in zip(lite0.strides, run(lite0, noise(1, 3, 45, 66)), strict=True):
            assert_close(feature[:, ::8, ::2, ::2], file[f"stride{stride}"])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 50)])
@pytest.mark.parametrize("name", CHANNELS)
def test_shapes(name: str, height: int, width: int) -> None:
    backbone = random_backbone(name, STRIDES)
    assert backbone.strides == STRIDES
    assert backbone.channels == CHANNELS[name]
    shapes = [feature.shape for feature in run(backbone, noise(2, 3, height, width))]
    assert shapes == [
        (2, c, -(-height // s), -(-width // s))
        for c, s in zip(CHANNELS[name], STRIDES, strict=True)
    ]


@pytest.mark.parametrize("name", SMALL)
def test_taps_do_not_depend_on_each_other_and_later_layers_are_not_built(name: str) -> None:
    deep = random_backbone(name, STRIDES)
    shallow = random_backbone(name, [8, 4])
    image = noise(1, 3, 64, 64)
    assert shallow.strides == [4, 8]
    for feature, expected in zip(run(shallow, image), run(deep, image)[1:3], strict=True):
        np.testing.assert_array_equal(feature, expected)
    assert len(shallow.state_dict()) < 0.6 * len(deep.state_dict())
    assert build_backbone(name).strides == [4, 8, 16]


@pytest.mark.parametrize("build", [resnet18, wide_resnet50_2])
def test_resnet_equals_paddle_vision(build: Callable[..., nn.Layer]) -> None:
    backbone = random_backbone(build.__name__, [8, 32])
    network = build(num_classes=0, with_pool=False)
    network.set_state_dict(backbone.state_dict())
    network.eval()
    image = noise(1, 3, 64, 64)
    with paddle.no_grad():
        expected = network(paddle.to_tensor(image)).numpy()
    np.testing.assert_array_equal(run(backbone, image)[-1], expected)


def test_mobilenet_v3_taps_before_the_norm() -> None:
    blocks = random_backbone("mobilenet_v3_large", [8, 16, 32])
    before = random_backbone("mobilenet_v3_large", [8, 16, 32], before_norm=True)
    seen: list[np.ndarray] = []
    for index in (5, 11, 14):  # torchvision's features 6, 12 and 15
        convolution = blocks.steps()[index + 1].linear_conv[0]
        convolution.register_forward_post_hook(lambda _, __, output: seen.append(output.numpy()))
    image = noise(1, 3, 64, 64)
    outputs = run(blocks, image)
    for feature, expected, output in zip(run(before, image), seen, outputs, strict=True):
        np.testing.assert_array_equal(feature, expected)
        assert np.abs(feature - output).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_changes_in_training(variant: str) -> None:
    name, *options = variant.split()
    backbone = random_backbone(name, [4, 8], **dict.fromkeys(options, True))
    head = nn.BatchNorm2D(backbone.channels[0])
    outer = nn.LayerList([backbone, head])
    state = {key: tensor.numpy().copy() for key, tensor in backbone.state_dict().items()}
    image = 3 + noise(2, 3, 32, 32)
    expected = run(backbone, image)
    outer.train()
    for feature, value in zip(run(backbone, image), expected, strict=True):
        np.testing.assert_array_equal(feature, value)
    assert head.training
    for key, tensor in backbone.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[key])
    assert all(parameter.stop_gradient for parameter in backbone.parameters())
    assert all(feature.stop_gradient for feature in backbone(paddle.to_tensor(image)))


@pytest.mark.parametrize("strides", [[], [4, 4], [3], [4, 64], [0]])
def test_wrong_strides(strides: list[int]) -> None:
    with pytest.raises(UserError, match=r"resnet18: strides .* 2, 4, 8, 16, 32"):
        build_backbone("resnet18", strides)


def test_unknown_name() -> None:
    assert set(BACKBONES) >= set(CHANNELS)
    with pytest.raises(UserError, match="unknown backbone 'resnet81'; choose one of efficient"):
        build_backbone("resnet81")


EXPORT = """
import sys
import numpy as np, paddle
from paddle.inference import Config, create_predictor
from paddle.static import InputSpec
from models.backbones import build_backbone
from models.backbones.weights import load_weights
folder, name, mode, tolerance, *options = sys.argv[1:]
backbone = build_backbone(name, [4, 8, 16, 32], **{option: True for option in options})
load_weights(backbone, allow_random=True)
spec = [InputSpec([None, 3, 65, 98], "float32", "image")]
static = paddle.jit.to_static(backbone, input_spec=spec, full_graph=True)
paddle.jit.save(static, folder + "/inference")
config = Config(folder + "/inference.json", folder + "/inference.pdiparams")
config.disable_gpu()
config.enable_mkldnn() if mode == "onednn" else config.disable_mkldnn()
predictor = create_predictor(config)
for batch in (1, 3):
    image = np.random.default_rng(0).standard_normal((batch, 3, 65, 98)).astype("float32")
    eager = backbone(paddle.to_tensor(image))
    for a, b in zip(eager, predictor.run([paddle.to_tensor(image)]), strict=True):
        assert a.shape == b.shape
        error = float((a - b).abs().max() / a.abs().max())
        assert error < float(tolerance), error
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "onednn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_graph_equals_eager(tmp_path: Path, repo: Path, variant: str, mode: str) -> None:
    name, *options = variant.split()
    # Random MobileNet features shrink with depth, and cancellation costs precision.
    tolerance = 1e-6 if mode == "plain" else 1e-3 if name.startswith("mobile") else 1e-5
    child = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), name, mode, str(tolerance), *options],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
