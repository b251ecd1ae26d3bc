"""Folding for export: the same numbers without batch norms, damping factors and gains."""

import numpy as np
import paddle
import pytest
from paddle import nn

from engine import session
from models.backbones import build_backbone
from models.backbones.base import Backbone
from models.backbones.folding import fold_batch_norms
from models.backbones.multiscale import MultiScale
from tests.small_run import photographs, settle, shake, tiny_config

SIDE = 64


def norms(layer: nn.Layer) -> list[nn.Layer]:
    return [each for each in layer.sublayers() if isinstance(each, nn.BatchNorm2D)]


def vary(backbone: Backbone) -> None:
    """Give the batch norms statistics and parameters that matter."""
    rng = np.random.default_rng(0)
    for norm in norms(backbone):
        count = norm._mean.shape[0]
        for value, low, high in (
            (norm._mean, -0.3, 0.3), (norm._variance, 0.5, 2.0),
            (norm.weight, 0.5, 1.5), (norm.bias, -0.3, 0.3),
        ):  # fmt: skip
            value.set_value(rng.uniform(low, high, count).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("efficientnet_lite0", {}, 0),
        ("resnet18", {}, 0),
        ("resnet18", {"padding": "reflect"}, 0),
        ("wide_resnet50_2", {}, 0),
        ("mobilenet_v2", {}, 0),
        ("mobilenet_v3_large", {}, 0),
        ("mobilenet_v3_large", {"before_norm": True}, 3),  # those behind the taps
        ("efficientnet_b5", {}, 0),
    ],
)
def test_backbones(name, options, kept):
    backbone = build_backbone(name, [4, 8, 16], **options)
    vary(backbone)
    images = paddle.to_tensor(photographs(2, SIDE))
    with paddle.no_grad():
        before = [level.numpy() for level in backbone(images)]
    count = len(norms(backbone))
    assert fold_batch_norms(backbone, images[:1]) == count - kept
    assert len(norms(backbone)) == kept
    after = [level.numpy() for level in backbone(images)]
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(ours).max())
    assert not any(not parameter.stop_gradient for parameter in backbone.parameters())


def test_one_backbone_at_several_scales():
    backbone = MultiScale(build_backbone("efficientnet_lite0", [16]))
    vary(backbone)
    images = paddle.to_tensor(photographs(1, 128))
    before = [level.numpy() for level in backbone(images)]
    assert fold_batch_norms(backbone, images) > 0
    assert not norms(backbone)
    for ours, theirs in zip(before, backbone(images), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * np.abs(ours).max())


def test_without_convolutions_before_them_norms_stay():
    backbone = nn.Sequential(nn.BatchNorm2D(3), nn.ReLU(), nn.Conv2D(3, 4, 1), nn.ReLU())
    backbone.eval()
    assert fold_batch_norms(backbone, paddle.ones([1, 3, 4, 4])) == 0


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("fastflow_efficientnet_lite0", ()),
        ("fastflow_efficientnet_lite0", ("model.coupling=two_sided", "model.norm=batch")),
        ("cflow_efficientnet_lite0", ()),
        ("csflow_efficientnet_lite0", ("model.hidden=16",)),
        ("csflow_efficientnet_lite0", ("model.hidden=16", "model.use_gamma=false")),
        ("uflow_efficientnet_lite0", ()),
    ],
)
def test_detectors(preset, settings):
    tiny = ["model.input_size=128"]
    if not preset.startswith("csflow"):
        tiny.append("model.steps=2")
    detector, _ = session.new_detector(load_preset(preset, [*tiny, *settings]), allow_random=True)
    shake(detector)
    settle(detector)
    detector.eval()
    images = paddle.to_tensor(photographs(2, 128))
    with paddle.no_grad():
        before = [output.numpy() for output in detector(images)]
        for _ in range(2):  # folding what is folded changes nothing
            detector.fold()
            for ours, theirs in zip(before, detector(images), strict=True):
                scale = max(1.0, float(np.abs(ours).max()))
                np.testing.assert_allclose(theirs.numpy() / scale, ours / scale, atol=1e-5)
    assert np.std(before[0]) > 0


def load_preset(preset: str, settings: list[str]):
    from tests.small_run import REPO
    from utils.config import load

    return load(REPO / f"configs/{preset}.yaml", settings)


def test_a_detector_s_constants_are_gone():
    """No damping, no gain and no batch norm of the backbone is left to compute."""
    detector, _ = session.new_detector(tiny_config(), allow_random=True)
    detector.eval()
    detector.fold()
    assert not norms(detector.backbone)
    steps = [step for level in detector.flow.levels for step in level]
    assert {step.damping for step in steps} == {1.0}
    assert all(step.affine._folded is not None for step in steps)
