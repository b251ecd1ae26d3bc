"""The detector as a whole: one inference path, independence of companions, what is trained."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from models import build_detector
from models.detector import Detector
from tests.small_run import REPO, photographs, settle, shake
from utils.config import Config, load, override
from utils.errors import UserError

# Those whose backbone keeps its numbers together: real weights, or few blocks of random ones. The
# others are in tests/test_configs.py.
SHIPPED = sorted(
    file
    for pattern in ("*lite0.yaml", "*resnet18.yaml", "fastflow_wide*.yaml", "uflow_wide*.yaml")
    for file in (REPO / "configs").glob(pattern)
)
QUICK = ("fastflow_efficientnet_lite0", "resnet18")


def built(config: Config, seed: int = 0) -> Detector:
    """Build a detector on random or bundled weights, and move it away from its start."""
    from engine import session

    detector, _ = session.new_detector(config, allow_random=True)
    shake(detector, seed)
    settle(detector)
    detector.eval()
    return detector


def small(file, *overrides: str) -> Config:
    for size in (64, 128, 256, 448):
        try:
            return load(file, [*overrides, f"model.input_size={size}"])
        except UserError:
            continue
    raise AssertionError(f"no small input size for {file}")


def tiny(*overrides: str) -> Config:
    base = load(REPO / "configs/fastflow_efficientnet_lite0.yaml", ["model.steps=2"])
    return override(base, ["model.input_size=64", *overrides])


@pytest.fixture(scope="module")
def detector() -> Detector:
    return built(tiny())


def images(count: int, size: int = 64) -> paddle.Tensor:
    return paddle.to_tensor(photographs(count, size))


def scored(detector: Detector, batch: paddle.Tensor) -> tuple[np.ndarray, np.ndarray]:
    with paddle.no_grad():
        anomaly_map, score, *_ = detector(batch)
    return anomaly_map.numpy(), score.numpy()


def companions(rng: np.random.Generator, count: int, size: int) -> Iterator[np.ndarray]:
    """Yield images that a batch could hold beside the one of interest."""
    yield rng.random((count, 3, size, size))
    yield np.zeros((count, 3, size, size))
    yield 1e3 * rng.standard_normal((count, 3, size, size))


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else [pytest.mark.slow])
        for file in SHIPPED
    ],
)
def test_a_score_does_not_depend_on_companions(file):
    """To rounding, whatever else is in the batch and however large it is."""
    config = small(file)
    detector = built(config)
    size = config.model.input_size[0]
    image = photographs(1, size)
    detector.fit_scorer([detector.features(paddle.to_tensor(image))])
    expected_map, expected = scored(detector, paddle.to_tensor(image))
    assert expected_map.std() > 1e-3  # not all at the end of its range
    tolerance = 1e-5 if config.model.flow == "cflow" else 1e-6  # products with up to 448 channels
    rng = np.random.default_rng(0)
    for count in (1, 4):
        for others in companions(rng, count, size):
            batch = np.concatenate([image, others.astype(np.float32)])
            anomaly_map, score = scored(detector, paddle.to_tensor(batch))
            np.testing.assert_allclose(score[0], expected[0], rtol=tolerance)
            scale = np.abs(expected_map).max()
            np.testing.assert_allclose(anomaly_map[0], expected_map[0], atol=tolerance * scale)
            reversed_score = scored(detector, paddle.to_tensor(batch[::-1].copy()))[1]
            np.testing.assert_allclose(reversed_score[-1], expected[0], rtol=tolerance)


def test_shapes_and_types(detector):
    anomaly_map, score = scored(detector, images(3))
    assert anomaly_map.shape == (3, 1, 64, 64)
    assert score.shape == (3,)
    assert anomaly_map.dtype == score.dtype == np.float32


def test_forward_is_features_then_score(detector):
    batch = images(2)
    with paddle.no_grad():
        parts = detector.score(detector.features(batch))
        whole = detector(batch)
        nll = detector.nll(batch)
    for ours, theirs in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(whole[2], nll)


def test_images_are_normalised_as_the_backbone_expects(detector):
    batch = images(2)
    mean, std = np.float32(0.5), np.float32(0.5)  # EfficientNet-Lite0's
    with paddle.no_grad():
        expected = detector.backbone((batch - mean) / std)
        found = detector.features(batch)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-5)


def test_likelihood_per_dimension(detector):
    """From latents and log-determinants in float64, for every image."""
    batch = images(3)
    with paddle.no_grad():
        latents, log_dets = detector.flow(detector.features(batch))
        nll = detector.nll(batch).numpy()
        again = detector.features_nll(detector.features(batch)).numpy()
    energy = sum((0.5 * z.numpy().astype(float) ** 2).sum((1, 2, 3)) for z in latents)
    volume = sum(d.numpy().astype(float).sum((1, 2, 3)) for d in log_dets)
    count = sum(int(np.prod(z.shape[1:])) for z in latents)
    np.testing.assert_allclose(nll, (energy - volume) / count, rtol=1e-5)
    np.testing.assert_array_equal(nll, again)


def test_the_objective_of_a_batch(detector):
    """`loss_norm: per_element`: the sum over levels of each level's own likelihood."""
    batch = images(3)
    with paddle.no_grad():
        features = detector.features(batch)
        loss, nll = detector.objective(features)
        latents, log_dets = detector.flow(features)
    levels = [
        ((0.5 * z.numpy().astype(float) ** 2).sum() - d.numpy().astype(float).sum())
        / z.numpy().size
        for z, d in zip(latents, log_dets, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(levels), rel=1e-5)
    assert nll.item() == pytest.approx(detector.nll(batch).numpy().mean(), rel=1e-5)


def test_only_the_head_is_trained(detector):
    trained = {name for name, p in detector.named_parameters() if not p.stop_gradient}
    assert trained
    assert not [name for name in trained if name.startswith("backbone.")]
    assert trained <= set(detector.head_state())
    assert not [name for name in detector.head_state() if name.startswith("backbone.")]


def test_gradients_reach_every_trained_parameter():
    detector = built(tiny())
    detector.train()
    detector.objective(detector.features(images(2)))[0].backward()
    for name, parameter in detector.named_parameters():
        if parameter.stop_gradient:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_the_backbone_has_no_training_mode(detector):
    batch = images(2)
    detector.eval()
    expected = [f.numpy() for f in detector.features(batch)]
    detector.train()
    found = [f.numpy() for f in detector.features(batch)]
    detector.eval()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_building_is_a_function_of_the_seed():
    model = dataclasses.asdict(tiny().model)
    one, same, other = (build_detector(model, seed).head_state() for seed in (0, 0, 1))
    assert all((one[name].numpy() == same[name].numpy()).all() for name in one)
    assert any((one[name].numpy() != other[name].numpy()).any() for name in one)


def test_constants_of_the_scorer_are_not_in_checkpoints(detector):
    """They follow from the configuration; a permutation does not, and is stored as integers."""
    state = detector.head_state()
    assert not [name for name in state if name.startswith(("scorer.", "mean", "std"))]
    permutations = [v for name, v in state.items() if name.endswith("permutation")]
    assert len(permutations) == 6  # 3 levels of 2 steps
    assert all(v.dtype == paddle.int64 and len(v.shape) == 1 for v in permutations)


def test_the_fastflow_paddle_preset_has_its_published_size():
    config = load(REPO / "configs/resnet18.yaml")
    detector = build_detector(dataclasses.asdict(config.model))
    trained = [p for p in detector.parameters() if not p.stop_gradient]
    assert sum(int(np.prod(p.shape)) for p in trained) == 4_896_728


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_inputs_that_are_not_square(size):
    config = tiny(f"model.input_size={list(size)}")
    detector = built(config)
    batch = paddle.to_tensor(photographs(2, 96)[:, :, : size[0], : size[1]].copy())
    anomaly_map, score = scored(detector, batch)
    assert anomaly_map.shape == (2, 1, *size)
    assert np.isfinite(score).all()


def test_the_map_changes_where_the_image_changes():
    detector = built(tiny("model.score=energy", "model.blur_sigma=2.0", "model.norm=none"))
    clean = photographs(1, 64)
    marked = clean.copy()
    marked[:, :, 8:24, 40:56] = np.random.default_rng(0).random((1, 3, 16, 16))
    before, after = (scored(detector, paddle.to_tensor(x))[0][0, 0] for x in (clean, marked))
    row, column = np.unravel_index(np.argmax(np.abs(after - before)), (64, 64))
    assert 4 <= row <= 28
    assert 36 <= column <= 60
