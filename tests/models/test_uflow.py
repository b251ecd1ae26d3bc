"""U-Flow against the reference implementation, and the mathematics of the U-shaped graph."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from models.flows import ops
from models.flows.uflow import LOSSES, UFlow, level_widths
from models.scoring.base import Evidence
from models.scoring.fastflow import FastFlowScorer
from tests.golden.make_uflow import TARGET, pinned_values

REFERENCE: dict[str, Any] = {
    "clamp": "tanh",
    "alpha": 2.0,
    "hidden_ratio": 1.0,
    "norm": "none",  # the golden features come after the norm
    "loss": "per_sample",
    "init": "torch",
}
CASES = ("uflow_resnet_layout_reduced", "uflow_resnet_layout_tiny_grads")
CHANNELS = [3, 6, 17]  # 7, 14 and 17 channels enter the levels
SIZES = [(16, 12), (8, 6), (4, 3)]
INPUT = (64, 48)
TINY = [(8, 4), (4, 2), (2, 1)]


def small_flow(seed: int = 0, sizes: list[tuple[int, int]] = SIZES, **changes: Any) -> UFlow:
    settings = dict(REFERENCE, steps=2, norm="layer") | changes
    flow = UFlow(CHANNELS, sizes, rng=np.random.default_rng(seed), **settings)
    rng = np.random.default_rng(seed + 1)
    for parameter in flow.parameters():  # nothing is an identity by accident
        noise = 0.1 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))
    return flow


def random_features(batch: int, sizes: list[tuple[int, int]] = SIZES) -> list[paddle.Tensor]:
    rng = np.random.default_rng(2)
    shapes = [(batch, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    return [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]


def our_key(module: int, name: str, steps: int) -> str:
    """Translate the reference's numbering: per level the steps, then split, up and concat."""
    position, step = divmod(module, steps + 3)
    name = re.sub(r"^global_", "affine.", name).replace("w_perm", "affine.permutation")
    name = name.replace("subnet.0.", "subnet.first.").replace("subnet.2.", "subnet.second.")
    return f"levels.{2 - position}.{step}.{name}"


def per_module(case: dict[str, np.ndarray], prefix: str) -> list[tuple[int, str, np.ndarray]]:
    found = []
    for key, value in case.items():
        match = re.fullmatch(rf"{prefix}/flow\.module_list\.(\d+)\.(.+)", key)
        if match and match[2] not in ("w_perm_inv", "downsample_kernel"):
            found.append((int(match[1]), match[2], value))
    return found


def load_reference(case: dict[str, np.ndarray], **changes: Any) -> UFlow:
    shapes = [case[f"feat{i}"].shape for i in range(3)]
    steps = int(re.findall(r"steps=(\d+)", str(case["meta"]))[0])
    flow = UFlow(
        [shape[1] for shape in shapes],
        [shape[2:] for shape in shapes],
        steps=steps,
        rng=np.random.default_rng(0),
        **(REFERENCE | changes),
    )
    state = {}
    for module, name, value in per_module(case, "sd"):
        if name == "w_perm":
            value = value[:, :, 0, 0].argmax(1)  # W[i, π(i)] = 1
        elif name.startswith("global"):
            value = value.reshape(-1)
        state[our_key(module, name, steps)] = value
    missing, unexpected = flow.set_state_dict(state)
    assert not missing
    assert not unexpected
    return flow


def features_of(case: dict[str, np.ndarray]) -> list[paddle.Tensor]:
    return [paddle.to_tensor(case[f"feat{i}"]) for i in range(3)]


def total_log_det(log_dets: list[paddle.Tensor]) -> np.ndarray:
    return sum(log_det.numpy().astype(np.float64).sum((1, 2, 3)) for log_det in log_dets)


@pytest.mark.parametrize("name", CASES)
def test_latents_log_dets_and_losses_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    latents, log_dets = flow(features_of(case))
    for i, (z, log_det) in enumerate(zip(latents, log_dets, strict=True)):
        assert log_det.shape == [z.shape[0], 1, *z.shape[2:]]
        np.testing.assert_allclose(z.numpy(), case[f"z{i}"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(total_log_det(log_dets), case["logdet"], rtol=1e-5)
    loss = flow.loss(latents, log_dets)
    np.testing.assert_allclose(loss.item(), case["loss_official_mean"], rtol=1e-5)
    summed = load_reference(case, loss="batch_sum").loss(latents, log_dets)
    np.testing.assert_allclose(summed.item(), case["loss_anomalib"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_inverse_matches_the_reference(golden, name):
    case = golden(name)
    back = load_reference(case).inverse([paddle.to_tensor(case[f"z{i}"]) for i in range(3)])
    for i, x in enumerate(back):
        np.testing.assert_allclose(x.numpy(), case[f"inv{i}"], atol=2e-5, rtol=0)
        np.testing.assert_allclose(x.numpy(), case[f"feat{i}"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_map_and_score_match_the_reference(golden, name):
    case = golden(name)
    sizes = [case[f"feat{i}"].shape[2:] for i in range(3)]
    scorer = FastFlowScorer(
        sizes, case["anomaly_map"].shape[2:], score="probability", align_corners=False,
        blur_sigma=0.0,
    )  # fmt: skip
    anomaly_map, score = scorer(*load_reference(case)(features_of(case)))
    np.testing.assert_allclose(anomaly_map.numpy(), case["anomaly_map"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(score.numpy(), case["score"].reshape(-1), atol=1e-5, rtol=0)


def test_gradients_match_the_reference(golden):
    case = golden("uflow_resnet_layout_tiny_grads")
    flow = load_reference(case)
    flow.loss(*flow(features_of(case))).backward()
    gradients = {name: p.grad.numpy() for name, p in flow.named_parameters()}
    reference = per_module(case, "grad")
    for module, name, value in reference:
        ours = gradients[our_key(module, name, steps=2)]
        tolerance = 1e-4 * max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(ours, value.reshape(ours.shape), atol=tolerance, rtol=1e-4)
    assert len(reference) == len(gradients)


def test_log_det_equals_the_autograd_jacobian():
    flow = small_flow(sizes=TINY, norm="none").to(dtype="float64")
    for level in flow.levels:
        for step in level:  # `to` casts indices too
            step.affine.permutation = step.affine.permutation.astype("int64")
    features = [f.astype("float64") for f in random_features(1, TINY)]
    for feature in features:
        feature.stop_gradient = False
    latents, log_dets = flow(features)
    flat = paddle.concat([z.reshape([-1]) for z in latents])
    rows = []
    for i in range(flat.shape[0]):
        parts = paddle.grad(flat[i], features, retain_graph=True, allow_unused=True)
        parts = [p if p is not None else 0 * f for p, f in zip(parts, features, strict=True)]
        rows.append(np.concatenate([p.numpy().ravel() for p in parts]))
    expected = np.linalg.slogdet(np.stack(rows)).logabsdet
    assert total_log_det(log_dets).item() == pytest.approx(expected, abs=1e-8)


def test_log_det_lies_where_the_channels_go():
    """A gain g of the coarsest level's 17 channels counts ln g wherever one of them ends up."""
    flow = small_flow(norm="none", steps=1)
    for level in flow.levels:  # no networks: all that is left are the gains, at first 1
        for values in level[0].subnet.second.parameters():
            values.set_value(paddle.zeros_like(values))
        level[0].affine.scale.set_value(paddle.full_like(level[0].affine.scale, 9.986478501))
    flow.levels[2][0].affine.scale.set_value(paddle.full([17], 9.0))
    gain = np.log(0.2 * np.log1p(np.exp(4.5)))
    _, log_dets = flow(random_features(2))
    # 9 of the 17 stay. The other 8 are 2 at each of four positions of the next level, of whose
    # 8 channels 4 stay and 4 go up once more: half and half, the latter at four positions.
    assert level_widths(CHANNELS) == [(0, 4), (4, 4), (8, 9)]
    np.testing.assert_allclose(log_dets[2].numpy(), 9 * gain, atol=1e-5)
    np.testing.assert_allclose(log_dets[1].numpy(), 2 * gain / 2, atol=1e-5)
    np.testing.assert_allclose(log_dets[0].numpy(), 2 * gain / 2 / 4, atol=1e-5)


def test_inverse_round_trip():
    flow = small_flow(norm="none", steps=4)
    features = random_features(3)
    for x, back in zip(features, flow.inverse(flow(features)[0]), strict=True):
        np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_reaches_every_parameter(loss):
    flow = small_flow(loss=loss)
    flow.loss(*flow(random_features(2))).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_pixel_shuffle_is_that_of_the_framework():
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 12, 3, 5)), "float32")
    ours = ops.pixel_shuffle(ops.enter(x))
    np.testing.assert_array_equal(ops.leave(ours).numpy(), F.pixel_shuffle(x, 2).numpy())
    np.testing.assert_array_equal(ops.leave(ops.pixel_unshuffle(ours)).numpy(), x.numpy())


PUBLISHED = {
    "mcait": ([768, 384], [(28, 28), (14, 14)], [816, 192], 12_216_480),
    "resnet18": ([64, 128, 256], [(64, 64), (32, 32), (16, 16)], [84, 80, 128], 1_479_880),
    "wide_resnet50_2": (
        [256, 512, 1024], [(64, 64), (32, 32), (16, 16)], [336, 320, 512], 23_594_080,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_widths_and_parameter_counts_of_the_published_networks(name):
    channels, sizes, latents, parameters = PUBLISHED[name]
    widths = level_widths(channels)
    assert [staying for _, staying in widths] == latents
    values = [c * h * w for c, (h, w) in zip(channels, sizes, strict=True)]
    kept = [c * h * w for c, (h, w) in zip(latents, sizes, strict=True)]
    assert sum(values) == sum(kept)  # nothing is lost
    flow = UFlow(channels, sizes, steps=4, rng=np.random.default_rng(0), **REFERENCE)
    assert sum(int(p.size) for p in flow.parameters()) == parameters


def test_one_level_is_a_plain_flow():
    flow = UFlow([5], [(3, 4)], steps=2, rng=np.random.default_rng(0), **REFERENCE)
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal((2, 5, 3, 4)), "float32")
    (z,), (log_det,) = flow([x])
    assert z.shape == [2, 5, 3, 4]
    assert log_det.shape == [2, 1, 3, 4]
    np.testing.assert_allclose(flow.inverse([z])[0].numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize("sizes", [[(8, 8), (4, 4), (1, 1)], [(9, 8), (4, 4), (2, 2)]])
def test_sizes_that_do_not_halve_are_an_error(sizes):
    with pytest.raises(ValueError, match="each half the one before"):
        UFlow(CHANNELS, sizes, steps=1, rng=np.random.default_rng(0), **REFERENCE)


def test_folding_changes_nothing():
    flow = small_flow()
    features = random_features(2)
    before = flow(features)
    flow.fold()
    after = flow(features)
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


def test_static_graph_layout_gives_the_same_numbers():
    flow = small_flow()
    flow.eval()
    features = random_features(2)
    expected = flow(features)
    actual = paddle.jit.to_static(flow, full_graph=True)(features)
    assert ops.channels_last()
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


class Head(paddle.nn.Layer):
    """What an exported U-Flow holds behind its backbone."""

    def __init__(self):
        super().__init__()
        self.flow = small_flow(steps=4)
        self.scorer = FastFlowScorer(SIZES, INPUT, score="nll", align_corners=False, blur_sigma=1.0)
        self.evidence = Evidence("tree", 0.9)

    def forward(self, fine, middle, coarse):
        latents, log_dets = self.flow([fine, middle, coarse])
        return *self.scorer(latents, log_dets), *self.evidence(latents)


EXPORT = """
import sys
import numpy as np, paddle
from paddle.inference import Config, create_predictor
from paddle.static import InputSpec
from tests.models.test_uflow import CHANNELS, SIZES, Head, random_features
folder, mode = sys.argv[1:]
head = Head()
head.eval()
batches = [random_features(n) for n in (1, 3)]
expected = [head(*features) for features in batches]
head.flow.fold()
specs = [InputSpec([None, c, *s], "float32") for c, s in zip(CHANNELS, SIZES)]
static = paddle.jit.to_static(head, input_spec=specs, full_graph=True)
paddle.jit.save(static, folder + "/inference")
config = Config(folder + "/inference.json", folder + "/inference.pdiparams")
config.disable_gpu()
config.enable_mkldnn() if mode == "onednn" else config.disable_mkldnn()
predictor = create_predictor(config)
for features, outputs in zip(batches, expected):
    actual = predictor.run(features)
    assert len(actual) == 5
    for a, b in zip(outputs, actual, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "onednn"])
def test_exported_head_equals_eager(tmp_path: Path, repo: Path, mode: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), mode],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]


def test_a_score_is_the_same_alone_and_in_any_batch():
    flow = small_flow()
    scorer = FastFlowScorer(SIZES, INPUT, score="probability", align_corners=False, blur_sigma=0.0)
    features = random_features(5)
    together = scorer(*flow(features))[1].numpy()
    for i in range(5):
        alone = scorer(*flow([f[i : i + 1] for f in features]))[1].numpy()
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5)


def test_energies_are_sums_of_squares():
    latents = random_features(2)
    for energy, z in zip(Evidence("tree", 0.9)(latents), latents, strict=True):
        np.testing.assert_allclose(energy.numpy(), (z.numpy() ** 2).sum(1), rtol=1e-5)


def test_pinned_small_flow():
    with np.load(TARGET) as pinned:
        values = pinned_values()
        assert set(values) == set(pinned)
        assert (values["tree"] > 0).any()
        for name, value in values.items():
            np.testing.assert_allclose(value, pinned[name], atol=1e-5, rtol=1e-4)
