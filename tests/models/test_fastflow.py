"""FastFlow against the reference implementation, and the mathematics of a flow."""

import itertools
import re
from typing import Any

import numpy as np
import paddle
import pytest

from models.flows import ops
from models.flows.base import negative_log_likelihood
from models.flows.fastflow import FastFlow
from models.flows.layers import CLAMPS, COUPLINGS, GLOBAL_SCALES, CouplingStep, GlobalAffine
from models.flows.subnets import ConvSubnet
from models.scoring.fastflow import FastFlowScorer
from tests.golden.make_fastflow import TARGET, pinned_values

REFERENCE: dict[str, Any] = {
    "coupling": "one_sided",
    "clamp": "tanh",
    "norm": "layer",
    "norm_momentum": 0.9,
    "global_scale": "softplus",
    "loss_norm": "none",
    "init": "torch",
}
CASES = (
    "fastflow_r18_reduced",
    "fastflow_effl0_width_hidden016",
    "fastflow_odd_nonsquare_hidden106_grads",
)


def small_flow(seed: int = 0, **changes: Any) -> FastFlow:
    settings = dict(REFERENCE, steps=3, hidden_ratio=1.0, conv3x3_only=False, alpha=2.0)
    settings.update(changes)
    return FastFlow([4, 6], [(8, 6), (4, 3)], rng=np.random.default_rng(seed), **settings)


def perturb(layer: paddle.nn.Layer, seed: int) -> None:
    """Move every parameter, so that nothing is an identity by accident."""
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        noise = 0.1 * rng.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_value(parameter + paddle.to_tensor(noise).astype(parameter.dtype))


def our_key(name: str) -> str:
    """Translate the reference's parameter name."""
    name = name.replace("fast_flow_blocks.", "levels.").replace("module_list.", "")
    name = re.sub(r"global_(scale|offset)$", r"affine.\1", name)
    name = name.replace("w_perm", "affine.permutation")
    return name.replace("subnet.0.", "subnet.first.").replace("subnet.2.", "subnet.second.")


def load_reference(case: dict[str, np.ndarray]) -> FastFlow:
    meta = str(case["meta"])
    levels = sum(re.fullmatch(r"feat\d+", key) is not None for key in case)
    shapes = [case[f"feat{i}"].shape for i in range(levels)]
    flow = FastFlow(
        [shape[1] for shape in shapes],
        [shape[2:] for shape in shapes],
        steps=int(re.findall(r"steps=(\d+)", meta)[0]),
        hidden_ratio=float(re.findall(r"hidden_ratio=([\d.]+)", meta)[0]),
        conv3x3_only="conv3x3_only=True" in meta,
        alpha=float(re.findall(r"clamp=([\d.]+)", meta)[0]),
        rng=np.random.default_rng(0),
        **REFERENCE,
    )
    state = {}
    for key, value in case.items():
        if not key.startswith("sd/") or key.endswith("w_perm_inv"):
            continue
        if key.endswith("w_perm"):
            value = value[:, :, 0, 0].argmax(1)  # W[i, π(i)] = 1
        elif key.endswith(("global_scale", "global_offset")):
            value = value.reshape(-1)
        state[our_key(key[3:])] = value
    missing, unexpected = flow.set_state_dict(state)
    assert not missing
    assert not unexpected
    return flow


def features_of(case: dict[str, np.ndarray], flow: FastFlow) -> list[paddle.Tensor]:
    return [paddle.to_tensor(case[f"feat{i}"]) for i in range(len(flow.levels))]


@pytest.mark.parametrize("name", CASES)
def test_latents_log_dets_and_loss_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    latents, log_dets = flow(features_of(case, flow))
    for i, (z, log_det) in enumerate(zip(latents, log_dets, strict=True)):
        assert log_det.shape == [z.shape[0], 1, *z.shape[2:]]
        np.testing.assert_allclose(z.numpy(), case[f"z{i}"], atol=1e-5, rtol=1e-5)
        total = log_det.sum(3).sum(2).sum(1).numpy()
        np.testing.assert_allclose(total, case[f"logdet{i}"], rtol=1e-4)
    np.testing.assert_allclose(flow.loss(latents, log_dets).item(), case["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_inverse_matches_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    back = flow.inverse([paddle.to_tensor(case[f"z{i}"]) for i in range(len(flow.levels))])
    for i, x in enumerate(back):
        np.testing.assert_allclose(x.numpy(), case[f"inv{i}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_map_and_score_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    sizes = [case[f"feat{i}"].shape[2:] for i in range(len(flow.levels))]
    input_size = case["anomaly_map"].shape[2:]
    scorer = FastFlowScorer(
        sizes, input_size, score="probability", align_corners=False, blur_sigma=0.0
    )
    anomaly_map, score = scorer(*flow(features_of(case, flow)))
    # The reference's maps run from −1 to 0, ours from 0 to 1.
    np.testing.assert_allclose(anomaly_map.numpy() - 1, case["anomaly_map"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(score.numpy() - 1, case["score"].reshape(-1), atol=1e-5, rtol=0)


def test_gradients_match_the_reference(golden):
    case = golden("fastflow_odd_nonsquare_hidden106_grads")
    flow = load_reference(case)
    flow.loss(*flow(features_of(case, flow))).backward()
    gradients = {name: p.grad.numpy() for name, p in flow.named_parameters()}
    compared = 0
    for key, value in case.items():
        if key.startswith("grad/"):
            ours = gradients[our_key(key[5:])]
            tolerance = 1e-4 * max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(ours, value.reshape(ours.shape), atol=tolerance, rtol=1e-4)
            compared += 1
    assert compared == len(gradients)


FORMS = list(itertools.product(CLAMPS, (1, 3), COUPLINGS, GLOBAL_SCALES))


def make_step(channels: int, clamp: str, kernel: int, coupling: str, scale: str) -> CouplingStep:
    rng = np.random.default_rng(3)

    def subnet(c_in: int, c_out: int) -> ConvSubnet:
        return ConvSubnet(c_in, c_out, hidden=4, kernel=kernel, init="paddle", rng=rng)

    step = CouplingStep(
        rng.permutation(channels), subnet, coupling=coupling, clamp=clamp, alpha=1.9,
        global_scale=scale,
    )  # fmt: skip
    perturb(step, 4)
    for net in (step.subnet, step.subnet_back):
        if net is not None:  # large outputs, so that the clamp is well away from linear
            net.second.bias.set_value(net.second.bias * 30)
    return step


@pytest.mark.parametrize(("clamp", "kernel", "coupling", "scale"), FORMS)
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_equals_the_autograd_jacobian(channels, clamp, kernel, coupling, scale):
    step = make_step(channels, clamp, kernel, coupling, scale).to(dtype="float64")
    step.affine.permutation = step.affine.permutation.astype("int64")  # `to` casts indices too
    rng = np.random.default_rng(5)
    x = paddle.to_tensor(rng.standard_normal((1, 3, 2, channels)), stop_gradient=False)
    y, log_det = step(x)
    flat = y.reshape([-1])
    rows = [
        paddle.grad(flat[i], x, retain_graph=True)[0].reshape([-1]).numpy()
        for i in range(flat.shape[0])
    ]
    expected = np.linalg.slogdet(np.stack(rows)).logabsdet
    assert log_det.sum().item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("clamp", "kernel", "coupling", "scale"), FORMS)
@pytest.mark.parametrize("channels", [6, 7])
def test_step_inverse_round_trip(channels, clamp, kernel, coupling, scale):
    step = make_step(channels, clamp, kernel, coupling, scale)
    x = paddle.to_tensor(np.random.default_rng(6).standard_normal((2, 5, 4, channels)), "float32")
    y, _ = step(x)
    np.testing.assert_allclose(step.inverse(y).numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_flow_inverse_round_trip(coupling):
    flow = small_flow(coupling=coupling, norm="none")
    perturb(flow, 1)
    rng = np.random.default_rng(2)
    shapes = ((3, 4, 8, 6), (3, 6, 4, 3))
    features = [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]
    for x, back in zip(features, flow.inverse(flow(features)[0]), strict=True):
        np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradient_reaches_every_parameter(coupling):
    flow = small_flow(coupling=coupling)
    perturb(flow, 1)
    rng = np.random.default_rng(2)
    shapes = ((2, 4, 8, 6), (2, 6, 4, 3))
    features = [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]
    flow.loss(*flow(features)).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_worked_example_of_one_step():
    """C = 4, x = (1, 2, 3, 4), network output (10, −5, 2, 3), α = 2, π = (2, 0, 3, 1)."""

    class Fixed(paddle.nn.Layer):
        def forward(self, x):
            return paddle.to_tensor([10, -5, 2, 3], "float32").reshape([1, 1, 1, 4])

    step = CouplingStep(
        np.array([2, 0, 3, 1]), lambda c_in, c_out: Fixed(), coupling="one_sided", clamp="tanh",
        alpha=2.0, global_scale="softplus",
    )  # fmt: skip
    y, log_det = step(paddle.to_tensor([1, 2, 3, 4], "float32").reshape([1, 1, 1, 4]))
    np.testing.assert_allclose(y.numpy().ravel(), [13.960478, 1, 1.887341, 2], rtol=1e-6)
    assert log_det.item() == pytest.approx(0.598954, abs=1e-6)


def test_global_scale_values():
    affine = GlobalAffine(np.arange(4), "softplus")
    assert affine.scale.numpy()[0] == pytest.approx(9.986478501)
    np.testing.assert_allclose(affine.gain().numpy(), 1.0, atol=1e-6)
    affine.scale.set_value(paddle.full([4], 9.0))
    assert affine.gain().numpy()[0] == pytest.approx(0.90220955, abs=1e-7)
    _, log_det = affine(paddle.zeros([1, 2, 3, 4]))
    assert 6 * log_det.item() == pytest.approx(-2.469803, abs=1e-5)


def test_raw_scale_of_zero_stays_finite():
    affine = GlobalAffine(np.arange(3), "raw")
    affine.scale.set_value(paddle.to_tensor([1, 0, -2], "float32"))
    _, log_det = affine(paddle.ones([1, 1, 1, 3]))
    log_det.backward()
    assert log_det.item() == pytest.approx(np.log(1e-6) + np.log(2), rel=1e-5)
    assert np.isfinite(affine.scale.grad.numpy()).all()


def test_folding_changes_nothing():
    flow = small_flow(coupling="two_sided")
    perturb(flow, 1)
    rng = np.random.default_rng(2)
    shapes = ((2, 4, 8, 6), (2, 6, 4, 3))
    features = [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]
    before = flow(features)
    flow.fold()
    after = flow(features)
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


def trainable(flow: FastFlow, prefix: str = "") -> int:
    return sum(
        int(p.size)
        for name, p in flow.named_parameters()
        if name.startswith(prefix) and not p.stop_gradient
    )


RESNET18 = ([64, 128, 256], [(64, 64), (32, 32), (16, 16)])


def test_parameter_counts_of_the_published_networks():
    rng = np.random.default_rng(0)
    shared = dict(REFERENCE, steps=8, hidden_ratio=1.0, alpha=2.0, rng=rng)
    flow = FastFlow(*RESNET18, conv3x3_only=True, **shared)
    assert trainable(flow, "levels") == 4_657_408
    assert trainable(flow, "norms") == 917_504
    assert trainable(FastFlow(*RESNET18, conv3x3_only=False, **shared), "levels") == 2_593_024
    two_sided = dict(
        shared, coupling="two_sided", norm="batch", global_scale="raw", init="paddle", steps=4,
        hidden_ratio=1.06,
    )  # fmt: skip
    assert trainable(FastFlow(*RESNET18, conv3x3_only=True, **two_sided)) == 4_896_728


def test_likelihood_of_a_standard_normal():
    rng = np.random.default_rng(0)
    z = paddle.to_tensor(rng.standard_normal((2, 5, 30, 40)), "float32")
    (total,) = negative_log_likelihood([z], [paddle.zeros([2, 1, 30, 40])])
    expected = 0.5 * (z.numpy().astype(np.float64) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-6)


def test_static_graph_layout_gives_the_same_numbers():
    flow = small_flow()
    perturb(flow, 1)
    flow.eval()
    rng = np.random.default_rng(2)
    features = [
        paddle.to_tensor(rng.standard_normal(shape), "float32")
        for shape in ((2, 4, 8, 6), (2, 6, 4, 3))
    ]
    expected = flow(features)
    static = paddle.jit.to_static(flow, full_graph=True)
    actual = static(features)
    assert ops.channels_last()
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


def test_pinned_small_flow():
    with np.load(TARGET) as pinned:
        values = pinned_values()
        assert set(values) == set(pinned)
        for name, value in values.items():
            np.testing.assert_allclose(value, pinned[name], atol=1e-5, rtol=1e-5)
