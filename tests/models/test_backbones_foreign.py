"""Weight files of other projects: names, shapes, and features equal to those of their networks.

The reference features come from torchvision, timm, efficientnet_pytorch and PaddleClas: see
tests/golden/make_backbones.py. A file's content is drawn from its names, so none is stored.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.vision import models as vision

from models.backbones import BACKBONES, Backbone, names
from models.backbones.mobilenet import MobileNetV3Large
from models.backbones.weights import load_weights, state_dict
from tests.golden import seeded_weights as seeded
from tests.models.test_backbones_vit import TinyDeit
from utils.errors import UserError
from utils.torch_file import write_torch
from utils.weight_file import WeightFile

FOLDER = Path(__file__).parents[1] / "golden" / "backbones"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
KINDS: dict[str, Callable[..., Backbone]] = {**BACKBONES, "tiny_deit": TinyDeit}
SYMMETRIC = ("efficientnet_b5.torchvision", "efficientnet_b5.timm-symmetric")
# By hand only: files of 0.3 to 1.4 GB. The converter's tests have the network with timm's epsilon.
LARGE = ("cait_m48_448.timm", "deit_base_distilled_384.timm", "deit_base_distilled_384.paddleclas")
ELSEWHERE = (*LARGE, "efficientnet_b5.timm-symmetric")
TOLERANCE = 1e-5  # of the largest value; 1.4e-6 was seen


class Reference:
    """What another project's network gave."""

    def __init__(self, case: str) -> None:
        with np.load(FOLDER / f"{case}.npz") as file:
            values = dict(file)
        self.shapes = seeded.from_text(values.pop("names").tobytes().decode())
        self.image = seeded.image(int(values.pop("size")))
        self.strides = sorted(int(key.removeprefix("norm")) for key in values if "norm" in key)
        self.values = values
        self.kind = KINDS[case.partition(".")[0]]
        self.options = {"padding": "symmetric"} if case in SYMMETRIC else {}

    def build(self) -> Backbone:
        return self.kind(self.strides, **self.options)

    def errors(self, backbone: Backbone) -> list[float]:
        """Return the largest difference per tap, relative to the largest value."""
        with paddle.no_grad():
            features = [feature.numpy() for feature in backbone(paddle.to_tensor(self.image))]
        found = []
        for stride, feature in zip(self.strides, features, strict=True):
            expected, norm = self.values[f"values{stride}"], self.values[f"norm{stride}"]
            assert feature.shape == tuple(self.values[f"shape{stride}"])
            difference = np.abs(seeded.sample(feature) - expected).max()
            ratio = np.linalg.norm(feature.astype(np.float64)) / norm
            found.append(float(max(difference / np.abs(expected).max(), abs(ratio - 1))))
        return found


def test_every_backbone_has_a_reference() -> None:
    named = {case.partition(".")[0] for case in CASES}
    assert named >= set(BACKBONES) - {"mcait"}  # which is made of two others


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes(case: str) -> None:
    """Every array has its place, or belongs to a layer behind the last tap."""
    reference = Reference(case)
    with paddle.LazyGuard():  # no memory is taken
        backbone = reference.build()
    check_names(backbone, reference.shapes)


@pytest.mark.parametrize("strides", [[32], [2, 4]])
@pytest.mark.parametrize(
    "name", ["resnet18", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_large"]
)
def test_names_of_paddle_vision(name: str, strides: list[int]) -> None:
    with paddle.LazyGuard():
        backbone = BACKBONES[name](strides)
        state = getattr(vision, name)().state_dict()
    check_names(backbone, {key: tuple(tensor.shape) for key, tensor in state.items()})


def check_names(backbone: Backbone, shapes: seeded.Shapes) -> None:
    arrays = {key: np.broadcast_to(np.float32(1), tuple(shape)) for key, shape in shapes.items()}
    bare = state_dict(WeightFile(Path("x"), "torch", arrays, []))
    translated = backbone.translate(bare)
    assert len(translated) == len(bare)
    own = {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()}
    assert {key: list(translated[key].shape) for key in own} == own
    assert [k for k in translated if k not in own and not backbone.is_unused_key(k)] == []


SLOW = [pytest.param("wide_resnet50_2.torchvision", marks=pytest.mark.slow)]
QUICK = [case for case in CASES if case not in (*ELSEWHERE, "wide_resnet50_2.torchvision")]


@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_features(case: str, tmp_path: Path) -> None:
    reference = Reference(case)
    arrays = seeded.draw_all(reference.shapes)
    path = tmp_path / "weights.pth"
    if case.endswith(".paddleclas"):
        paddle.save({key: paddle.to_tensor(array) for key, array in arrays.items()}, str(path))
    else:
        write_torch(path, arrays)
    backbone = reference.build()
    assert load_weights(backbone, path).origin == "file"
    assert max(reference.errors(backbone)) < TOLERANCE


def test_epsilon_of_timm_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference("mobilenet_v3_large.timm")
    write_torch(tmp_path / "a.pth", seeded.draw_all(reference.shapes))
    monkeypatch.setattr(names, "TIMM_EPSILON", MobileNetV3Large.epsilon)
    backbone = reference.build()
    load_weights(backbone, tmp_path / "a.pth")
    assert min(reference.errors(backbone)) > 10 * TOLERANCE


def test_epsilon_moves_into_the_scale() -> None:
    """Hold also where the variance is far below both epsilons, or zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(6)
    arrays = {
        "a.norm.weight": rng.standard_normal(6).astype(np.float32),
        "a.norm._variance": np.array([0, 1e-9, 1e-4, 1e-2, 1, 100], np.float32),
        "a.conv.weight": np.ones((6, 2, 1, 1), np.float32),
        "b.weight": np.ones(3, np.float32),
    }
    scaled = names.with_epsilon(arrays, 1e-5, 1e-3)
    results = [
        x / np.sqrt(each["a.norm._variance"].astype(np.float64) + epsilon) * each["a.norm.weight"]
        for each, epsilon in ((arrays, 1e-5), (scaled, 1e-3))
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)
    assert scaled["a.norm.weight"].dtype == np.float32
    for key in ("a.norm._variance", "a.conv.weight", "b.weight"):
        assert scaled[key] is arrays[key]


@pytest.mark.parametrize(
    ("prefix", "nested"),
    [("module.", True), ("backbone.", False), ("model.", True), ("model.module.backbone.", False)],
)
def test_wrappers(prefix: str, nested: bool, tmp_path: Path) -> None:
    backbone = BACKBONES["mobilenet_v2"]([2])
    arrays = {
        prefix + key: seeded.draw(key, tensor.shape)
        for key, tensor in backbone.state_dict().items()
    }
    write_torch(tmp_path / "a.pth", arrays, {"epoch": 3} if nested else None)
    load_weights(backbone, tmp_path / "a.pth")
    for key, tensor in backbone.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[prefix + key])

    arrays["teacher.weight"] = np.ones(1, np.float32)
    write_torch(tmp_path / "b.pth", arrays)
    with pytest.raises(UserError, match=r"mobilenet_v2: unknown teacher\.weight$"):
        load_weights(backbone, tmp_path / "b.pth")


def test_names_that_only_wrappers_tell_apart_stay_apart() -> None:
    arrays = {"module.a": np.ones(1), "a": np.zeros(1)}
    assert names.unwrapped(arrays) is arrays


def test_lite0_of_efficientnet_pytorch_is_the_bundled_one(shared_weights: Path) -> None:
    theirs, bundled = (BACKBONES["efficientnet_lite0"]([32]) for _ in range(2))
    load_weights(theirs, shared_weights / "efficientnet_lite0.npz")
    assert load_weights(bundled).origin == "bundled"
    assert theirs.weight_hash == bundled.weight_hash
