"""CS-Flow against the reference implementation, its mathematics, its scorer, its export."""

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from models.flows import ops
from models.flows.base import dimensions
from models.flows.csflow import (
    CrossScaleCoupling,
    CrossScaleNet,
    CSFlow,
    block_permutations,
    doubling_matrix,
)
from models.flows.layers import CLAMPS
from models.scoring.csflow import MAPS, SCORES, CSFlowScorer
from tests.golden.make_csflow import TARGET, pinned_values

ONE_BLOCK, FOUR_BLOCKS = "csflow_ch304_hidden8_nogamma_1block", "csflow_reduced_16ch"
CASES = (ONE_BLOCK, FOUR_BLOCKS)
SIZES = [(8, 4), (4, 2), (2, 1)]


def small_flow(channels: int = 6, seed: int = 0, **changes: Any) -> CSFlow:
    settings: dict[str, Any] = {"blocks": 2, "hidden": 5, "alpha": 3.0, "permutation": "official"}
    rng = np.random.default_rng(seed)
    return CSFlow([channels] * 3, SIZES, **(settings | changes), rng=rng)


def perturb(layer: paddle.nn.Layer, seed: int, amount: float = 0.3) -> None:
    """Move every parameter, so that nothing is an identity by accident."""
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        noise = amount * rng.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_value(parameter + paddle.to_tensor(noise).astype(parameter.dtype))


def pyramid(batch: int = 2, channels: int = 6, seed: int = 2) -> list[paddle.Tensor]:
    rng = np.random.default_rng(seed)
    return [paddle.to_tensor(rng.standard_normal((batch, channels, *s)), "float32") for s in SIZES]


def doubled(layer: paddle.nn.Layer) -> paddle.nn.Layer:
    """Bring a layer to float64; `to` casts indices too, so put those back."""
    layer = layer.to(dtype="float64")
    for block in [layer, *layer.sublayers()]:
        for scale in range(3):
            if isinstance(block, CrossScaleCoupling):
                order = getattr(block, f"permutation{scale}")
                setattr(block, f"permutation{scale}", order.astype("int64"))
    return layer


def our_key(name: str) -> str:
    """Translate the reference's parameter name."""
    name = re.sub(r"module_list\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2 - 2}.", name)
    name = name.replace(".s1.", ".to_second.").replace(".s2.", ".to_first.")
    name = re.sub(r"conv_scale(\d)_0", r"enter.\1", name)
    name = re.sub(r"conv_scale(\d)_1", r"direct.\1", name)
    name = re.sub(r"up_conv\d(\d)", r"up.\1", name)
    return re.sub(r"gamma(\d)", r"gamma.\1", re.sub(r"down_conv(\d)\d", r"down.\1", name))


def load_reference(case: dict[str, np.ndarray]) -> CSFlow:
    meta = str(case["meta"])
    setting = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", meta)}
    use_gamma = "gamma=True" in meta
    flow = CSFlow(
        [setting["channels"]] * 3,
        [case[f"feat{i}"].shape[2:] for i in range(3)],
        blocks=setting["blocks"],
        hidden=setting["hidden"],
        alpha=setting["clamp"],
        permutation="official",
        rng=np.random.default_rng(0),
        last_kernel=int(re.findall(r"(\d)\]", meta)[0]),
        use_gamma=use_gamma,
    )
    state = {our_key(key[3:]): value for key, value in case.items() if key.startswith("sd/")}
    if not use_gamma:
        state = {key: value for key, value in state.items() if "gamma" not in key}
    for index in range(setting["blocks"]):
        for scale in range(3):
            state[f"blocks.{index}.permutation{scale}"] = case[f"perm{index}_s{scale}"]
    missing, unexpected = flow.set_state_dict(state)
    assert not missing
    assert not unexpected
    return flow


def features_of(case: dict[str, np.ndarray], kind: str = "feat") -> list[paddle.Tensor]:
    return [paddle.to_tensor(case[f"{kind}{i}"]) for i in range(3)]


def assert_near(actual: paddle.Tensor | np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare relative to the largest expected value: that is how the reference's noise is."""
    assert tuple(actual.shape) == expected.shape
    difference = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert difference < tolerance, difference


@pytest.mark.parametrize("name", CASES)
def test_latents_log_dets_and_loss_match_the_reference(golden, name):
    case = golden(name)
    flow = load_reference(case)
    latents, log_dets = flow(features_of(case))
    for i, (z, log_det) in enumerate(zip(latents, log_dets, strict=True)):
        assert log_det.shape == [z.shape[0], 1, *z.shape[2:]]
        assert_near(z, case[f"z{i}"], 5e-6)
        total = log_det.sum(3).sum(2).sum(1).numpy()
        np.testing.assert_allclose(total, case[f"jac{i}"], rtol=1e-5)
    np.testing.assert_allclose(flow.loss(latents, log_dets).item(), case["loss"], rtol=1e-6)


def test_every_block_matches_the_reference(golden):
    case = golden(FOUR_BLOCKS)
    flow = load_reference(case)
    maps = [ops.enter(x[:1]) for x in features_of(case)]  # only the first image was traced
    for index, block in enumerate(flow.blocks):
        for scale in range(3):
            order = getattr(block, f"permutation{scale}").numpy()
            permuted = ops.leave(maps[scale]).numpy()[:, order]
            assert_near(permuted, case[f"trace{2 * index}_s{scale}"], 5e-6)
        maps, _ = block(maps)
        for scale in range(3):
            assert_near(ops.leave(maps[scale]), case[f"trace{2 * index + 1}_s{scale}"], 5e-6)


@pytest.mark.parametrize("name", CASES)
def test_inverse_matches_the_reference(golden, name):
    """Exactly in float64; rounding z (up to 120) to float32 alone moves the exact one by 2e-4."""
    case = golden(name)
    flow = doubled(load_reference(case))
    latents, _ = flow([x.astype("float64") for x in features_of(case)])
    for i, x in enumerate(flow.inverse(latents)):
        np.testing.assert_allclose(x.numpy(), case[f"feat{i}"], atol=1e-10)
    back = load_reference(case).inverse(features_of(case, "z"))
    for i, x in enumerate(back):
        tolerance = (
            3e-4 if name == ONE_BLOCK else 1e-3
        )  # the order of a sum moves it as far as that
        np.testing.assert_allclose(x.numpy(), case[f"inv{i}"], atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_maps_and_score_match_the_reference(golden, name):
    case = golden(name)
    latents = features_of(case, "z")
    sizes = [tuple(z.shape[2:]) for z in latents]
    input_size = case["anomaly_map_anomalib_all"].shape[2:]
    for map_from, key in (("all", "all"), ("largest", "max")):
        scorer = CSFlowScorer(sizes, input_size, score="mean", map_from=map_from)
        anomaly_map, score = scorer(latents, [])
        assert_near(anomaly_map, case[f"anomaly_map_anomalib_{key}"], 1e-6)
        np.testing.assert_allclose(score.numpy(), case["score"], rtol=1e-6)
    as_it_is = CSFlowScorer(sizes, sizes[0], score="mean", map_from="largest")(latents, [])[0]
    assert_near(as_it_is[:, 0], case["map_scale0_official"], 1e-6)


PERMUTATION_STARTS = """
66 156 247 267 145 135 | 222 196 64 232 186 40 | 14 158 98 275 225 261 | 162 295 123 299 119 0
222 159 220 175 185 296 | 116 134 111 125 13 8 | 191 79 111 295 24 126 | 192 172 10 121 108 9
99 296 89 30 234 292 | 300 229 63 176 288 0 | 31 250 172 239 148 15 | 113 169 282 292 254 251
246 162 10 161 73 16 | 127 232 80 81 153 120 | 276 121 207 158 87 122 | 126 146 133 62 94 83
"""


def test_permutations_are_those_of_the_references():
    for block, line in enumerate(PERMUTATION_STARTS.strip().splitlines()):
        expected = [[int(number) for number in part.split()] for part in line.split("|")]
        official = block_permutations(block, 304, "official")
        assert [order[:6].tolist() for order in official] == expected[:3]
        anomalib = block_permutations(block, 304, "anomalib")
        assert [order[:6].tolist() for order in anomalib] == [expected[3]] * 3


def test_permutations_are_stored_as_integers():
    state = small_flow(permutation="anomalib").state_dict()
    for block in range(2):
        for scale in range(3):
            stored = state[f"blocks.{block}.permutation{scale}"]
            assert stored.dtype == paddle.int64
            expected = block_permutations(block, 6, "anomalib")[scale]
            np.testing.assert_array_equal(stored.numpy(), expected)


def small_block(channels: int, kernel: int, sizes: list[tuple[int, int]]) -> CrossScaleCoupling:
    rng = np.random.default_rng(3)
    block = CrossScaleCoupling(
        block_permutations(1, channels, "official"), sizes, hidden=4, kernel=kernel, alpha=1.9,
        use_gamma=True, rng=rng,
    )  # fmt: skip
    perturb(block, 4, 0.5)
    for name, parameter in block.named_parameters():
        if "gamma" in name:  # large outputs, so that the clamp is well away from linear
            parameter.set_value(paddle.full([1], 2.0))
    return doubled(block)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", [4, 5])
def test_log_det_equals_the_autograd_jacobian(channels, kernel):
    """Of the whole block over all scales; its Jacobian has no zero blocks between scales."""
    sizes = [(4, 8), (2, 4), (1, 2)]
    block = small_block(channels, kernel, sizes)
    rng = np.random.default_rng(5)
    x = [paddle.to_tensor(rng.standard_normal((1, *s, channels))) for s in sizes]
    for scale in x:
        scale.stop_gradient = False
    y, log_dets = block(x)
    flat = paddle.concat([level.reshape([-1]) for level in y])
    rows = [
        np.concatenate([g.numpy().ravel() for g in paddle.grad(flat[i], x, retain_graph=True)])
        for i in range(flat.shape[0])
    ]
    jacobian = np.stack(rows)
    assert np.abs(jacobian[: 32 * channels, 32 * channels :]).max() > 1e-3
    expected = np.linalg.slogdet(jacobian).logabsdet
    assert sum(log_det.sum().item() for log_det in log_dets) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", [4, 5])
def test_block_inverse_round_trip(channels, kernel):
    sizes = [(12, 8), (6, 4), (3, 2)]
    block = small_block(channels, kernel, sizes)
    rng = np.random.default_rng(6)
    x = [paddle.to_tensor(rng.standard_normal((2, *s, channels))) for s in sizes]
    for back, original in zip(block.inverse(block(x)[0]), x, strict=True):
        np.testing.assert_allclose(back.numpy(), original.numpy(), atol=1e-11)


@pytest.mark.parametrize("channels", [6, 7])
def test_flow_inverse_round_trip(channels):
    flow = small_flow(channels)
    perturb(flow, 1, 0.1)
    features = pyramid(3, channels)
    for x, back in zip(features, flow.inverse(flow(features)[0]), strict=True):
        np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
def test_network_equals_its_definition(kernel):
    """Written channels-first with Paddle's own interpolation and LeakyReLU."""
    rng = np.random.default_rng(0)
    net = CrossScaleNet(4, 6, SIZES, hidden=5, kernel=kernel, use_gamma=True, rng=rng)
    perturb(net, 1)
    assert net.gamma is not None
    x = pyramid(2, 4)

    def conv(layer: Any, value: paddle.Tensor, stride: int = 1) -> paddle.Tensor:
        return F.conv2d(value, layer.weight, layer.bias, stride=stride, padding=kernel // 2)

    def up(value: paddle.Tensor) -> paddle.Tensor:
        return F.interpolate(value, scale_factor=2, mode="bilinear", align_corners=False)

    a, b, c = (F.leaky_relu(conv(net.enter[s], x[s]), 0.1) for s in range(3))
    expected = [
        conv(net.direct[0], a) + conv(net.up[0], up(b)),
        conv(net.direct[1], b) + conv(net.down[0], a, 2) + conv(net.up[1], up(c)),
        conv(net.direct[2], c) + conv(net.down[1], b, 2),
    ]
    actual = net([ops.enter(level) for level in x])
    for scale in range(3):
        wanted = (net.gamma[scale] * expected[scale]).numpy()
        np.testing.assert_allclose(ops.leave(actual[scale]).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_doubling_is_bilinear(length):
    x = np.random.default_rng(0).standard_normal((1, 1, length, length)).astype(np.float32)
    expected = F.interpolate(paddle.to_tensor(x), scale_factor=2, mode="bilinear").numpy()[0, 0]
    matrix = doubling_matrix(length)
    np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, expected, atol=1e-6)


def test_an_untrained_flow_only_permutes():
    flow = small_flow()
    features = pyramid()
    latents, log_dets = flow(features)
    for scale in range(3):
        expected = features[scale].numpy()
        for block in range(2):
            expected = expected[:, block_permutations(block, 6, "official")[scale]]
        np.testing.assert_array_equal(latents[scale].numpy(), expected)
        assert not log_dets[scale].any()
    flow.loss(latents, log_dets).backward()
    for name, parameter in flow.named_parameters():
        assert ("gamma" in name) == bool(parameter.grad.any()), name


@pytest.mark.parametrize("channels", [6, 7])
def test_gradient_reaches_every_parameter(channels):
    flow = small_flow(channels)
    perturb(flow, 1)
    flow.loss(*flow(pyramid(2, channels))).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_loss_is_per_image_and_per_value():
    """Not the batch-summed log-determinant of a known implementation."""
    flow = small_flow()
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((4, 6, *size)) for size in SIZES]
    log_dets = [rng.standard_normal((4, 1, *size)) for size in SIZES]
    terms = [
        sum(0.5 * (z[b] ** 2).sum() - j[b].sum() for z, j in zip(latents, log_dets, strict=True))
        for b in range(4)
    ]
    z, j = ([paddle.to_tensor(x, "float32") for x in xs] for xs in (latents, log_dets))
    assert flow.loss(z, j).item() == pytest.approx(np.mean(terms) / (6 * 42), rel=1e-6)


def test_blocks_clip_their_output_and_not_the_log_det():
    flow = small_flow(blocks=1)
    features = pyramid()
    features[0] = features[0] * 1e8
    latents, log_dets = flow(features)
    assert latents[0].abs().max().item() == 1e6
    assert not log_dets[0].any()


def test_clamp_values():
    given = paddle.to_tensor([0.1, 1.0, 3.0, 10.0])
    expected = [0.063576, 0.613900, 1.498540, 2.440980]
    np.testing.assert_allclose(CLAMPS["atan"](given, 3.0).numpy(), expected, atol=1e-6)


def test_kernels_are_3_and_5_in_the_last_block():
    for blocks, expected in ((1, [5]), (3, [3, 3, 5])):
        flow = small_flow(blocks=blocks)
        assert [block.to_first.up[0].weight.shape[-1] for block in flow.blocks] == expected


def test_the_second_part_is_the_larger_one_of_an_odd_number():
    block = small_flow(7).blocks[0]
    for net, c_in, c_out in ((block.to_first, 4, 3), (block.to_second, 3, 4)):
        assert net.enter[0].weight.shape[:2] == [5, c_in]
        assert net.down[1].weight.shape[:2] == [2 * c_out, 5]


class _Zeros:
    """Stands in for a generator where only shapes count."""

    def uniform(self, low: float, high: float, shape: Any) -> np.ndarray:
        return np.zeros(shape, np.float32)


@pytest.mark.parametrize(("blocks", "hidden", "count"), [(4, 1024, 275227288), (1, 512, 66157734)])
def test_parameter_counts_of_the_published_networks(blocks, hidden, count):
    sizes = [(24, 24), (12, 12), (6, 6)]
    rng: Any = _Zeros()
    flow = CSFlow(
        [304] * 3, sizes, blocks=blocks, hidden=hidden, alpha=3.0, permutation="official",
        rng=rng,
    )  # fmt: skip
    assert sum(int(p.size) for p in flow.parameters() if not p.stop_gradient) == count
    assert sum(dimensions([paddle.empty([1, 304, *size]) for size in sizes])) == 229824


def test_start_is_pytorchs():
    net = small_flow(8, hidden=400).blocks[0].to_first
    bound = 1 / np.sqrt(400 * 9)
    for value in (net.down[0].weight.numpy(), net.down[0].bias.numpy()):
        assert np.abs(value).max() <= bound
        assert np.abs(value).max() > 0.8 * bound
    assert [gamma.item() for gamma in net.gamma] == [0, 0, 0]


def test_wrong_scales():
    for sizes in ([(8, 8), (4, 4), (3, 2)], [(8, 8), (4, 4)], [(9, 8), (5, 4), (3, 2)]):
        with pytest.raises(ValueError, match="each half the one before"):
            CSFlow([4] * 3, sizes, **SETTINGS)
    for channels in ([4, 4], [4, 4, 8]):
        with pytest.raises(ValueError, match="3 maps of one tap"):
            CSFlow(channels, SIZES, **SETTINGS)


SETTINGS: dict[str, Any] = {
    "blocks": 1, "hidden": 4, "alpha": 3.0, "permutation": "official",
    "rng": np.random.default_rng(0),
}  # fmt: skip


def test_scores_are_the_moments_of_all_latents_together():
    latents = [(1 + scale) * z for scale, z in enumerate(pyramid(3))]
    energies = np.concatenate([0.5 * z.numpy().reshape(3, -1) ** 2 for z in latents], axis=1)
    scores = {s: CSFlowScorer(SIZES, (32, 16), score=s, map_from="all") for s in SCORES}
    values = {name: scorer(latents, []) for name, scorer in scores.items()}
    np.testing.assert_allclose(values["mean"][1].numpy(), energies.mean(1), rtol=1e-6)
    np.testing.assert_allclose(values["std"][1].numpy(), energies.std(1), rtol=1e-6)
    maximum = values["mean"][0].numpy().max((1, 2, 3))
    np.testing.assert_array_equal(values["max"][1].numpy(), maximum)


def test_maps_are_the_mean_energy_of_the_largest_scale_or_the_product_of_all():
    latents = pyramid(3)
    levels = [
        F.interpolate((z * z).mean(1, keepdim=True), size=[32, 16], mode="bilinear").numpy()
        for z in latents
    ]
    expected = {"largest": levels[0], "all": levels[0] * levels[1] * levels[2]}
    for map_from in MAPS:
        scorer = CSFlowScorer(SIZES, (32, 16), score="mean", map_from=map_from)
        np.testing.assert_allclose(scorer(latents, [])[0].numpy(), expected[map_from], rtol=1e-5)


def test_the_largest_latents_allowed_stay_finite():
    latents = [1e6 * paddle.ones_like(z) for z in pyramid(1)]
    for score in SCORES:
        anomaly_map, value = CSFlowScorer(SIZES, (32, 16), score=score, map_from="all")(latents, [])
        assert np.isfinite(anomaly_map.numpy()).all()
        assert np.isfinite(value.numpy()).all()


@pytest.mark.parametrize("map_from", MAPS)
@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_the_same_alone_and_in_any_batch(score, map_from):
    flow = small_flow(7)
    perturb(flow, 1)
    scorer = CSFlowScorer(SIZES, (32, 16), score=score, map_from=map_from)
    features = pyramid(5, 7)
    maps, scores = scorer(*flow(features))
    for i in range(5):
        alone = scorer(*flow([x[i : i + 1] for x in features]))
        np.testing.assert_allclose(alone[1].numpy()[0], scores.numpy()[i], rtol=1e-5)
        np.testing.assert_allclose(alone[0].numpy()[0], maps.numpy()[i], rtol=1e-4, atol=1e-5)


def test_static_graph_layout_gives_the_same_numbers():
    flow = small_flow(7)
    perturb(flow, 1)
    flow.eval()
    features = pyramid(2, 7)
    expected = flow(features)
    actual = paddle.jit.to_static(flow, full_graph=True)(features)
    assert ops.channels_last()
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        assert_near(b, a.numpy(), 1e-6)


EXPORT = """
import sys
import numpy as np, paddle
from paddle import nn
from paddle.inference import Config, create_predictor
from paddle.static import InputSpec
from models.flows.csflow import CSFlow
from models.scoring.csflow import CSFlowScorer
from tests.models.test_csflow import perturb
folder, mode, score, map_from = sys.argv[1:]
SIZES = [(8, 16), (4, 8), (2, 4)]


class Net(nn.Layer):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 13, 3, padding=1)
        rng = np.random.default_rng(0)
        self.flow = CSFlow(
            [13] * 3, SIZES, blocks=3, hidden=24, alpha=3.0, permutation="official", rng=rng
        )
        self.scorer = CSFlowScorer(SIZES, (64, 128), score=score, map_from=map_from)

    def forward(self, image):
        features = [self.stem(image[:, :, ::step, ::step]) for step in (8, 16, 32)]
        return self.scorer(*self.flow(features))


paddle.seed(0)
net = Net()
perturb(net, 1, 0.1)
net.eval()
net.flow.fold()
spec = [InputSpec([None, 3, 64, 128], "float32", "image")]
paddle.jit.save(paddle.jit.to_static(net, input_spec=spec, full_graph=True), folder + "/inference")
config = Config(folder + "/inference.json", folder + "/inference.pdiparams")
config.disable_gpu()
config.enable_mkldnn() if mode == "onednn" else config.disable_mkldnn()
config.enable_new_executor()
config.enable_memory_optim()
predictor = create_predictor(config)
for batch in (1, 3):
    image = np.random.default_rng(batch).standard_normal((batch, 3, 64, 128)).astype("float32")
    eager = net(paddle.to_tensor(image))
    assert float(eager[1].max()) > 0
    for a, b in zip(eager, predictor.run([paddle.to_tensor(image)]), strict=True):
        assert a.shape == b.shape
        error = float((a - b).abs().max() / a.abs().max())
        assert error < 1e-5, error
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "onednn"])
@pytest.mark.parametrize("preset", ["mean largest", "std largest", "max all"])
def test_exported_graph_equals_eager(tmp_path, repo, preset, mode):
    script = tmp_path / "export.py"  # a file, since to_static reads the source
    script.write_text(EXPORT, encoding="utf-8")
    child = subprocess.run(
        [sys.executable, str(script), str(tmp_path), mode, *preset.split()],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]


def test_pinned_small_flow():
    with np.load(TARGET) as pinned:
        values = pinned_values()
        assert set(values) == set(pinned)
        for name, value in values.items():
            np.testing.assert_allclose(value, pinned[name], atol=1e-5, rtol=1e-5)
