"""CFLOW-AD against the reference implementations, and the mathematics of a conditional flow."""

import itertools
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import inference

from models.flows import ops
from models.flows.cflow import REMAINDERS, CFlow, FiberSubnet, log_likelihoods
from models.flows.layers import CouplingStep, GlobalAffine
from models.flows.permutations import PERMUTES, draw_permutation, rotation
from models.flows.position import position_code
from models.scoring.cflow import CFlowScorer, maps_relative_to_set
from tests.golden.make_cflow import TARGET, pinned_values

CASES = ("cflow_official_3layers_cond16", "cflow_official_cond128_8blocks")
CHANNELS = (5, 8)  # odd and even
SIZES = [(8, 6), (4, 3)]
INPUT = (32, 24)
FORMS = list(itertools.product(PERMUTES, (0, 8)))


def perturb(layer: paddle.nn.Layer, seed: int) -> None:
    """Move every parameter, so that nothing is an identity by accident."""
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        noise = 0.2 * rng.standard_normal(parameter.shape)
        parameter.set_value(parameter + paddle.to_tensor(noise, "float32"))


def small_flow(**changes: Any) -> CFlow:
    settings: dict[str, Any] = {
        "steps": 3, "code_channels": 8, "permute": "soft", "clamp": "tanh", "alpha": 1.9,
        "rng": np.random.default_rng(0),
    }  # fmt: skip
    flow = CFlow(CHANNELS, SIZES, **{**settings, **changes})
    perturb(flow, 1)
    return flow


def small_features(batch: int = 2, seed: int = 2) -> list[paddle.Tensor]:
    rng = np.random.default_rng(seed)
    shapes = [(batch, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]
    return [paddle.to_tensor(rng.standard_normal(shape), "float32") for shape in shapes]


def our_state(key: str, value: np.ndarray, code_channels: int) -> dict[str, np.ndarray]:
    """Translate one entry of the reference's state dict."""
    found = re.fullmatch(r"(?:decoders\.)?(\d+)\.module_list\.(\d+)\.(.+)", key)
    assert found
    prefix, name = f"levels.{found[1]}.{found[2]}.", found[3]
    if name == "subnet.0.weight":
        split = value.shape[1] - code_channels
        weights = {"weight": value[:, :split], "code_weight": value[:, split:]}
        return {f"{prefix}subnet.first.{k}": v for k, v in weights.items()}
    if name.startswith("global_"):
        return {f"{prefix}affine.{name[7:]}": value.reshape(-1)}
    name = name.replace("subnet.0", "subnet.first").replace("subnet.2", "subnet.second")
    return {prefix + name.replace("w_perm", "affine.rotation"): value}


def translated(case: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Return all entries of a kind, `sd/` or `grad/`, under our names."""
    state: dict[str, np.ndarray] = {}
    for key, value in case.items():
        if key.startswith(kind) and not key.endswith("w_perm_inv"):
            state.update(our_state(key[len(kind) :], value, case["posenc0"].shape[0]))
    return state


def load_reference(case: dict[str, np.ndarray]) -> CFlow:
    features = features_of(case)
    flow = CFlow(
        [f.shape[1] for f in features],
        [tuple(f.shape[2:]) for f in features],
        steps=int(re.findall(r"blocks=(\d+)", str(case["meta"]))[0]),
        code_channels=case["posenc0"].shape[0],
        permute="soft",
        clamp="tanh",
        alpha=float(re.findall(r"clamp=([\d.]+)", str(case["meta"]))[0]),
        rng=np.random.default_rng(0),
    )
    missing, unexpected = flow.set_state_dict(translated(case, "sd/"))
    assert not missing
    assert not unexpected
    return flow


def features_of(case: dict[str, np.ndarray]) -> list[paddle.Tensor]:
    levels = sum(re.fullmatch(r"feat\d+", key) is not None for key in case)
    return [paddle.to_tensor(case[f"feat{i}"]) for i in range(levels)]


def both(result: Any) -> list[paddle.Tensor]:
    """Return latents and log-dets in one list."""
    latents, log_dets = result
    return [*latents, *log_dets]


def rows(x: paddle.Tensor) -> np.ndarray:
    """Return the fibres of (B, C, H, W) in the reference's order, (B·H·W, C)."""
    return x.transpose([0, 2, 3, 1]).reshape([-1, x.shape[1]]).numpy()


@pytest.mark.parametrize("name", CASES)
def test_latents_likelihoods_and_loss_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    latents, log_dets = flow(features_of(case))
    likelihoods = log_likelihoods(latents, log_dets)
    for i, z in enumerate(latents):
        assert log_dets[i].shape == [z.shape[0], 1, *z.shape[2:]]
        np.testing.assert_allclose(rows(z), case[f"z{i}"], atol=1e-5, rtol=1e-5)
        log_det = rows(log_dets[i])[:, 0]
        np.testing.assert_allclose(log_det, case[f"logdet{i}"], rtol=1e-4, atol=1e-5)
        per_dimension = rows(likelihoods[i])[:, 0]
        np.testing.assert_allclose(per_dimension, case[f"logp_per_dim{i}"], atol=1e-5)
    expected = sum(float(case[f"loss{i}"]) for i in range(len(latents)))
    assert flow.loss(latents, log_dets).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_inverse_matches_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    latents = []
    for i, feature in enumerate(features_of(case)):
        batch, channels, height, width = feature.shape
        z = case[f"z{i}"].reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
        latents.append(paddle.to_tensor(z))
    for i, x in enumerate(flow.inverse(latents)):
        np.testing.assert_allclose(rows(x), case[f"inv{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_official_and_anomalib_maps_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    likelihoods = log_likelihoods(*flow(features_of(case)))
    official = case["anomaly_map_official_f64"]
    arrays = [value.squeeze(1).numpy() for value in likelihoods]
    maps, scores = maps_relative_to_set(arrays, official.shape[1:])
    np.testing.assert_allclose(maps, official, atol=1e-5, rtol=0)
    np.testing.assert_allclose(maps, case["anomaly_map_anomalib"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores, case["score_official"], atol=1e-5, rtol=0)


def test_gradients_match_the_reference(golden):
    case = golden("cflow_official_3layers_cond16")
    flow = load_reference(case)
    flow.loss(*flow(features_of(case))).backward()
    expected = translated(case, "grad/")
    gradients = {name: p.grad.numpy() for name, p in flow.named_parameters()}
    assert set(gradients) == set(expected)
    for name, value in expected.items():
        tolerance = 1e-4 * float(np.abs(value).max())
        np.testing.assert_allclose(gradients[name], value, atol=tolerance, rtol=1e-4)


def test_position_codes_match_the_reference(golden):
    code = position_code(128, 7, 13)
    np.testing.assert_allclose(code, golden("cflow_posenc_128_7x13")["posenc"], atol=1e-6)
    for name in CASES:
        case = golden(name)
        flow = load_reference(case)
        for i, layer in enumerate(flow.codes):
            np.testing.assert_allclose(layer().numpy()[0], case[f"posenc{i}"], atol=1e-6)


def test_position_code_worked_values():
    expected = [0.909297, -0.416147, 0.019999, 0.999800, 0.841471, 0.540302, 0.010000, 0.999950]
    np.testing.assert_allclose(position_code(8, 3, 4)[:, 1, 2], expected, atol=1e-6)
    code = position_code(128, 32, 32)
    here = code[:, 5, 7]
    expected = [0.656987, 0.753902, -0.859313, 0.511449, -0.713721, -0.700430]
    np.testing.assert_allclose(here[:6], expected, atol=1e-6)
    np.testing.assert_allclose(here[64:68], [-0.958924, 0.283662, -0.571127, -0.820862], atol=1e-6)
    assert code.sum() == pytest.approx(53824.396315, abs=1e-5)


@pytest.mark.parametrize("channels", [2, 6, -4])
def test_position_code_refuses_other_widths(channels):
    with pytest.raises(ValueError, match="multiple of 4"):
        position_code(channels, 3, 3)


def make_step(channels: int, permute: str, code_channels: int) -> CouplingStep:
    rng = np.random.default_rng(3)

    def subnet(c_in: int, c_out: int) -> FiberSubnet:
        return FiberSubnet(c_in, c_out, code_channels=code_channels, rng=rng)

    step = CouplingStep(
        draw_permutation(permute, channels, rng), subnet, coupling="one_sided", clamp="tanh",
        alpha=1.9, global_scale="softplus",
    )  # fmt: skip
    perturb(step, 4)  # large outputs, so that the clamp is well away from linear
    step.subnet.second.bias.set_value(step.subnet.second.bias * 10)
    return step


@pytest.mark.parametrize(("permute", "code_channels"), FORMS)
@pytest.mark.parametrize("size", [(1, 2), (3, 4)])  # scale and mixing in turn, and as one product
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_equals_the_autograd_jacobian_at_every_position(
    channels, size, permute, code_channels
):
    step = make_step(channels, permute, code_channels).to(dtype="float64")
    if permute == "hard":  # `to` casts indices too
        step.affine.permutation = step.affine.permutation.astype("int64")
    rng = np.random.default_rng(5)
    x = paddle.to_tensor(rng.standard_normal((1, *size, channels)), stop_gradient=False)
    code = paddle.to_tensor(rng.standard_normal((1, *size, 8))) if code_channels else None
    y, log_det = step(x, code)
    flat, positions = y.reshape([-1]), size[0] * size[1]
    jacobian = np.stack(
        [paddle.grad(value, x, retain_graph=True)[0].numpy().ravel() for value in flat]
    ).reshape(positions, channels, positions, channels)
    for p, q in itertools.product(range(positions), repeat=2):
        block = jacobian[p, :, q]
        if p != q:
            assert not block.any()
            continue
        expected = np.linalg.slogdet(block).logabsdet
        assert log_det.numpy().ravel()[p] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("permute", PERMUTES)
@pytest.mark.parametrize("channels", [4, 7])
def test_scale_and_mixing_in_turn_equal_one_product(channels, permute):
    rng = np.random.default_rng(0)
    affine = GlobalAffine(draw_permutation(permute, channels, rng), "softplus")
    perturb(affine, 1)
    x = paddle.to_tensor(rng.standard_normal((1, 1, 1, channels)), "float32")
    direction = paddle.to_tensor(rng.standard_normal(x.shape), "float32")
    results = []
    for copies in (1, 20):  # few positions: in turn; many: one product
        affine.clear_gradients()
        y, log_det = affine(paddle.tile(x, [copies, 1, 1, 1]))
        ((y * direction).sum() / copies + log_det).backward()
        gradients = [affine.scale.grad.numpy(), affine.offset.grad.numpy()]
        results.append([y.numpy()[0], log_det.numpy(), *gradients])
    for few, many in zip(*results, strict=True):
        np.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("permute", "code_channels"), FORMS)
def test_flow_inverse_round_trip(permute, code_channels):
    flow = small_flow(permute=permute, code_channels=code_channels)
    features = small_features(3)
    for x, back in zip(features, flow.inverse(flow(features)[0]), strict=True):
        np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize(("permute", "code_channels"), FORMS)
def test_gradient_reaches_every_parameter(permute, code_channels):
    flow = small_flow(permute=permute, code_channels=code_channels)
    features = small_features()
    whole = flow.loss(*flow(features))
    fibers = [loss for _, loss in flow.fiber_losses(features, 24, "drop", np.random.default_rng(0))]
    for loss in (whole, sum(fibers[1:], fibers[0])):
        flow.clear_gradients()
        loss.backward()
        for name, parameter in flow.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_hard_permutation_equals_the_rotation_by_its_matrix():
    hard = small_flow(permute="hard")
    soft = small_flow(permute="soft")
    state = hard.state_dict()
    for name in [name for name in state if name.endswith("affine.permutation")]:
        index = state.pop(name).numpy()
        matrix = np.eye(len(index), dtype=np.float32)[index]
        state[name.replace("permutation", "rotation")] = paddle.to_tensor(matrix)
    assert soft.set_state_dict(state) == ([], [])
    features = small_features()
    for a, b in zip(both(hard(features)), both(soft(features)), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)


def test_the_condition_is_the_position_alone():
    """Equal features give different latents at different positions, equal ones in every image."""
    flow = small_flow()
    features = [paddle.ones([2, c, *size]) for c, size in zip(CHANNELS, SIZES, strict=True)]
    for z in flow(features)[0]:
        first, second = z.numpy()
        np.testing.assert_allclose(first, second, atol=1e-6)
        flat = first.reshape(first.shape[0], -1)
        distances = np.abs(flat[:, :, None] - flat[:, None]).max(0)
        assert (distances + np.eye(len(distances)) > 1e-3).all()
    for z in small_flow(code_channels=0)(features)[0]:
        assert np.ptp(z.numpy(), (0, 2, 3)).max() < 1e-5


@pytest.mark.parametrize("code_channels", [0, 8])
def test_whole_maps_equal_fibres_one_by_one(code_channels):
    flow = small_flow(code_channels=code_channels)
    features = small_features()
    likelihoods = log_likelihoods(*flow(features))
    for level, (height, width) in enumerate(SIZES):
        codes = position_code(8, height, width).astype(np.float32)
        for b, h, w in itertools.product(range(2), range(height), range(width)):
            fiber = features[level][b : b + 1, :, h, w]
            code = paddle.to_tensor(codes[None, :, h, w]) if code_channels else None
            alone = flow.fiber_log_likelihood(level, fiber, code).numpy()
            np.testing.assert_allclose(alone, likelihoods[level].numpy()[b, :, h, w], atol=1e-5)


def test_fibre_batches_cover_a_level_once_and_average_to_its_loss():
    flow, features = small_flow(), small_features()
    count, order = 16, np.random.default_rng(7)  # divides 96 and 24 + 8
    losses = [(i, v.item()) for i, v in flow.fiber_losses(features, count, "drop", order)]
    assert [level for level, _ in losses] == [0] * 6 + [1]
    whole = flow.loss(*[part[:1] for part in flow(features)]).item()
    assert np.mean([v for level, v in losses if level == 0]) == pytest.approx(whole, rel=1e-5)
    again = flow.fiber_losses(features, count, "drop", np.random.default_rng(7))
    assert [(i, v.item()) for i, v in again] == losses
    other = flow.fiber_losses(features, count, "drop", np.random.default_rng(8))
    assert [(i, v.item()) for i, v in other] != losses


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_fibres_left_over_are_dropped_or_merged(monkeypatch, remainder):
    flow, features = small_flow(), small_features()
    seen: dict[int, list[paddle.Tensor]] = {0: [], 1: []}

    def record(level: int, fibers: paddle.Tensor, codes: paddle.Tensor) -> paddle.Tensor:
        seen[level].append(fibers)
        return fibers.sum()

    monkeypatch.setattr(flow, "fiber_loss", record)
    list(flow.fiber_losses(features, 10, remainder, np.random.default_rng(0)))
    sizes = {level: [len(fibers) for fibers in batches] for level, batches in seen.items()}
    last = 10 if remainder == "drop" else 16
    assert sizes == {0: [10] * 8 + [last], 1: [10, 10 if remainder == "drop" else 14]}
    taken = np.concatenate([fibers.numpy() for fibers in seen[0]])
    everything = rows(features[0])
    assert len(np.unique(taken, axis=0)) == len(taken)
    assert {row.tobytes() for row in taken} <= {row.tobytes() for row in everything}


def test_fibre_batch_larger_than_a_level():
    flow, features = small_flow(), small_features()
    with pytest.raises(ValueError, match=r"24 fibres in a batch of images, fewer than .* 30"):
        list(flow.fiber_losses(features, 30, "drop", np.random.default_rng(0)))
    merged = list(flow.fiber_losses(features, 1000, "merge", np.random.default_rng(0)))
    total = sum(loss.item() for _, loss in merged)
    assert len(merged) == 2
    assert total == pytest.approx(flow.loss(*flow(features)).item(), rel=1e-5)


def test_loss_of_a_latent_zero():
    z, log_det = paddle.zeros([2, 6, 3, 4]), paddle.zeros([2, 1, 3, 4])
    (likelihood,) = log_likelihoods([z], [log_det])
    np.testing.assert_allclose(likelihood.numpy(), -0.9189385332, rtol=1e-6)
    assert small_flow().loss([z], [log_det]).item() == pytest.approx(1.254655, abs=1e-6)


def counts(channels: tuple[int, ...]) -> list[int]:
    flow = CFlow(
        channels, [(8, 8)] * len(channels), steps=8, code_channels=128, permute="hard",
        clamp="tanh", alpha=1.9, rng=np.random.default_rng(0),
    )  # fmt: skip
    return [sum(int(p.size) for p in level.parameters()) for level in flow.levels]


def test_parameter_counts_of_the_published_networks():
    assert counts((128, 256, 512)) == [989_184, 2_107_392, 5_523_456]  # ResNet-18
    assert counts((40, 112, 160)) == [448_512, 877_056, 1_231_872]  # MobileNetV3-L


@pytest.mark.slow
def test_parameter_count_of_the_wide_resnet():
    assert counts((1024, 2048)) == [17_074_176, 59_049_984]


def test_initial_weights_are_those_of_pytorch():
    net = FiberSubnet(72, 40, code_channels=128, rng=np.random.default_rng(0))
    for layer, fan_in in ((net.first, 200), (net.second, 400)):
        for parameter in layer.parameters():
            values = parameter.numpy()
            assert np.abs(values).max() <= fan_in**-0.5
            assert np.abs(values).max() > 0.9 * fan_in**-0.5
            assert abs(values.mean()) < 0.15 * fan_in**-0.5


@pytest.mark.parametrize("channels", [2, 3, 40, 113])
def test_rotation_is_a_rotation(channels):
    matrix = rotation(channels, np.random.default_rng(channels))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(channels), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_rotations_are_uniform():
    """Entries of a uniform rotation have mean 0 and variance 1/C, and its trace variance 1."""
    rng = np.random.default_rng(0)
    draws = np.stack([rotation(4, rng) for _ in range(1000)])
    assert np.abs(draws.mean(0)).max() < 0.07  # 4.4 standard errors
    np.testing.assert_allclose((draws**2).mean(0), 0.25, atol=0.04)
    assert np.trace(draws, axis1=1, axis2=2).var() == pytest.approx(1.0, abs=0.15)


@pytest.mark.slow
def test_rotation_of_2048_channels_takes_seconds():
    started = time.process_time()
    matrix = rotation(2048, np.random.default_rng(0))
    assert time.process_time() - started < 20
    x = np.random.default_rng(1).standard_normal(2048)
    assert np.linalg.norm(matrix @ x) == pytest.approx(np.linalg.norm(x))


@pytest.mark.parametrize(("permute", "code_channels"), FORMS)
def test_folding_changes_nothing(permute, code_channels):
    flow = small_flow(permute=permute, code_channels=code_channels)
    features = small_features()
    before = both(flow(features))
    state = set(flow.state_dict())
    flow.fold()
    assert set(flow.state_dict()) == state
    for a, b in zip(before, both(flow(features)), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
    with pytest.raises(RuntimeError, match="folded"):
        flow.fiber_loss(0, paddle.zeros([3, 5]), paddle.zeros([3, 8]))


@pytest.mark.parametrize(("permute", "code_channels"), FORMS)
def test_static_graph_layout_gives_the_same_numbers(permute, code_channels):
    flow = small_flow(permute=permute, code_channels=code_channels)
    flow.eval()
    features = small_features()
    expected = both(flow(features))
    static = paddle.jit.to_static(flow, full_graph=True)
    actual = both(static(features))
    assert ops.channels_last()
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)


class Head(paddle.nn.Layer):
    """Flow and scorer behind two inputs, as they are exported behind a backbone."""

    def __init__(self, flow: CFlow, scorer: CFlowScorer) -> None:
        super().__init__()
        self.flow, self.scorer = flow, scorer

    def forward(self, fine, coarse):
        latents, log_dets = self.flow([fine, coarse])
        return self.scorer(latents, log_dets)


@pytest.fixture(scope="module", params=FORMS, ids=str)
def exported(request, tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """Return a bundle, and map and score of three images from the dynamic model."""
    permute, code_channels = request.param
    head = Head(small_flow(permute=permute, code_channels=code_channels), CFlowScorer(SIZES, INPUT))
    head.eval()
    head.scorer.fit([head.flow(small_features(4, seed=5))])
    expected = [value.numpy() for value in head(*small_features(3))]
    head.flow.fold()
    specs = [
        paddle.static.InputSpec([None, c, *size], "float32", name)
        for c, size, name in zip(CHANNELS, SIZES, ("fine", "coarse"), strict=True)
    ]
    folder = tmp_path_factory.mktemp("bundle")
    static = paddle.jit.to_static(head, input_spec=specs, full_graph=True)
    paddle.jit.save(static, str(folder / "inference"))
    return folder, expected


@pytest.mark.parametrize("onednn", [False, True])
def test_exported_graph_gives_the_same_numbers_at_any_batch_size(exported, onednn):
    folder, expected = exported
    config = inference.Config(str(folder / "inference.json"), str(folder / "inference.pdiparams"))
    config.disable_gpu()
    config.disable_glog_info()
    if onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    for batch in (1, 3):
        for name, x in zip(("fine", "coarse"), small_features(3), strict=True):
            values = np.ascontiguousarray(x.numpy()[:batch])
            predictor.get_input_handle(name).reshape(values.shape)
            predictor.get_input_handle(name).copy_from_cpu(values)
        predictor.run()
        for name, value in zip(predictor.get_output_names(), expected, strict=True):
            actual = predictor.get_output_handle(name).copy_to_cpu()
            np.testing.assert_allclose(actual, value[:batch], atol=1e-5)


def likelihood_case(values: list[float]) -> tuple[list[paddle.Tensor], list[paddle.Tensor]]:
    """Return latents and log-dets of one image, one level of 1×n positions, with given ℓ."""
    z = paddle.zeros([1, 2, 1, len(values)])
    log_det = 2 * (np.array(values) + 0.5 * np.log(2 * np.pi))
    return [z], [paddle.to_tensor(log_det.reshape(1, 1, 1, -1), "float32")]


def test_scorer_compares_with_the_peak_of_training_normals():
    scorer = CFlowScorer([(1, 4)], (1, 4))
    scorer.fit([likelihood_case([0.5, -1.0, 0.0]), likelihood_case([0.2, 0.7, -3.0])])
    assert scorer.peaks.item() == pytest.approx(0.7, abs=1e-6)
    anomaly_map, score = scorer(*likelihood_case([0.7, 1.9, -0.3, -40.0]))
    expected = [0.0, 0.0, 1 - np.exp(-1.0), 1.0]  # more likely than any normal: 0 as well
    np.testing.assert_allclose(anomaly_map.numpy().ravel(), expected, atol=1e-6)
    assert score.item() == pytest.approx(1.0)


def test_scorer_with_a_quantile_as_peak():
    values = np.linspace(-1, 1, 1001).tolist()
    scorer = CFlowScorer([(1, 1001)], (1, 1001), quantile=0.9)
    scorer.fit([likelihood_case(values)])
    assert scorer.peaks.item() == pytest.approx(0.8, abs=1e-5)


def test_scorer_needs_images_to_fit_on():
    with pytest.raises(ValueError, match="no images"):
        CFlowScorer(SIZES, INPUT).fit([])


def test_peaks_are_kept_in_checkpoints_and_codes_are_not():
    head = Head(small_flow(), CFlowScorer(SIZES, INPUT))
    head.scorer.fit([head.flow(small_features())])
    state = head.state_dict()
    assert "scorer.peaks" in state
    assert not [name for name in state if "codes" in name or "to_map" in name]
    other = Head(small_flow(rng=np.random.default_rng(9)), CFlowScorer(SIZES, INPUT))
    assert other.set_state_dict(state) == ([], [])
    features = small_features(seed=3)
    for a, b in zip(head(*features), other(*features), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_calibrated_and_official_maps_differ_by_a_constant_on_the_fitted_images():
    flow, scorer = small_flow(), CFlowScorer(SIZES, INPUT)
    latents, log_dets = flow(small_features(3))
    scorer.fit([(latents, log_dets)])
    likelihoods = [v.squeeze(1).numpy() for v in log_likelihoods(latents, log_dets)]
    official, _ = maps_relative_to_set(likelihoods, INPUT)
    anomaly_map, score = scorer(latents, log_dets)
    assert np.ptp(anomaly_map.numpy()[:, 0] - official) < 1e-5
    np.testing.assert_array_equal(score.numpy(), anomaly_map.numpy().max((1, 2, 3)))


def test_a_calibrated_score_is_the_same_alone_and_in_any_batch():
    flow, scorer = small_flow(), CFlowScorer(SIZES, INPUT, blur_sigma=1.0)
    scorer.fit([flow(small_features(4, seed=5))])
    features = small_features(6)
    maps, scores = (value.numpy() for value in scorer(*flow(features)))
    assert np.ptp(scores) > 1e-3
    assert 0 <= maps.min() < maps.max() <= len(SIZES)
    for i in range(6):
        anomaly_map, score = scorer(*flow([level[i : i + 1] for level in features]))
        np.testing.assert_allclose(score.numpy()[0], scores[i], rtol=1e-5)
        np.testing.assert_allclose(anomaly_map.numpy()[0], maps[i], atol=1e-5)


def test_pinned_small_flow():
    with np.load(TARGET) as pinned:
        values = pinned_values()
        assert set(values) == set(pinned)
        for name, value in values.items():
            np.testing.assert_allclose(value, pinned[name], atol=1e-5, rtol=1e-5)
