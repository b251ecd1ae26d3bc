"""Foreign checkpoints: recognised, read strictly, and equal under every form of their names."""

from typing import Any

import numpy as np
import paddle
import pytest

from convert import cflow, common, csflow, fastflow, uflow
from convert.foreign import understand
from convert.sources import identify
from models.flows.csflow import block_permutations
from models.flows.fastflow import FastFlow
from tests.convert import foreign_files as foreign
from tests.convert.foreign_files import renamed
from utils.errors import UserError

Arrays = dict[str, np.ndarray]


def read(content: Any, *user: str, category: str = "bottle", **options: Any) -> Any:
    settings: dict[str, Any] = {"source": "auto", "backbone": None, **options}
    return understand(content, category=category, user=user, **settings)


def flow_of(case: str) -> Arrays:
    return identify({"state_dict": foreign.state_dict(case)}).flow


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(a, other[k]) for k, a in one.items())


def index_vectors(arrays: Arrays) -> Arrays:
    """Store permutations as FrEIA does since June 2023."""
    found = dict(arrays)
    for name, array in arrays.items():
        if "w_perm" in name:
            found[name] = array.reshape(array.shape[:2]).argmax(1)
    return found


def official_cflow() -> dict[str, Any]:
    arrays = foreign.network("cflow")
    encoder = "encoder.feature_extractor."
    decoders = [f"decoders.{level}." for level in range(3)]
    return {
        "encoder_state_dict": {
            k.removeprefix(encoder): a for k, a in arrays.items() if k.startswith(encoder)
        },
        "decoder_state_dict": [
            {k.removeprefix(own): a for k, a in arrays.items() if k.startswith(own)}
            for own in decoders
        ],
    }


def official_csflow(last: int = 6) -> Arrays:
    """Rename anomalib's; its two blocks become the numbers 4 and `last`."""
    flow = {k: a for k, a in foreign.network("csflow").items() if k.startswith("graph.")}
    return renamed(
        flow, (r"^graph\.graph\.", ""), (r"cross_convolution(\d)", r"s\1"),
        (r"module_list\.3\.", f"module_list.{last}."), (r"module_list\.1\.", "module_list.4."),
    )  # fmt: skip


def official_uflow() -> dict[str, Any]:
    arrays = renamed(foreign.network("uflow"), (r"^feature_extractor\.feature_extractor", "model."
                     "feature_extractor.extractor"), (r"^f", "model.f"))  # fmt: skip
    return {"epoch": 3, "state_dict": {**arrays, "model.aupro.curve": np.zeros(3, np.float32)}}


@pytest.mark.parametrize(
    "rules",
    [
        [(r"^fast_flow_blocks", "nf_flows")],
        [(r"subnet\.0", "subnet.1"), (r"subnet\.2", "subnet.4")],  # behind padding layers
        [(r"subnet\.", "s."), (r"w_perm", "w")],  # FrEIA 0.2
    ],
    ids=["gathierry", "older anomalib", "FrEIA 0.2"],
)
def test_every_form_of_the_names_gives_the_same(rules):
    arrays = flow_of("fastflow")
    assert same(fastflow.read(renamed(arrays, *rules), {}).head, fastflow.read(arrays, {}).head)


def test_index_vectors_are_the_same_permutations_and_mean_a_newer_clamp():
    arrays = flow_of("fastflow")
    before, after = (fastflow.read(each, {}) for each in (arrays, index_vectors(arrays)))
    assert same(before.head, after.head)
    assert before.head["levels.0.0.affine.permutation"].dtype == np.int64
    assert "clamp" not in before.model
    assert after.model["clamp"] == "tanh_scaled"
    assert "index vectors" in after.notes[0]
    content = {"model_state_dict": renamed(index_vectors(foreign.network("fastflow")),
                                           (r"^fast_flow_blocks", "nf_flows"))}  # fmt: skip
    assert read(content).config.model.clamp == "tanh_scaled"
    assert read(content, "model.clamp=tanh").config.model.clamp == "tanh"


def test_gathierry():
    arrays = renamed(foreign.network("fastflow"), (r"^fast_flow_blocks", "nf_flows"))
    found = read({"epoch": 12, "model_state_dict": arrays})
    assert found.source.title == "gathierry's FastFlow"
    assert found.epoch == 12
    assert found.config.model.input_size == (64, 96)  # by the layer norms
    assert (found.config.model.clamp, found.config.model.score) == ("tanh", "probability")
    assert "resnet18 with its weights" in found.line()


def test_official_cflow():
    found = read(official_cflow())
    model = found.config.model
    assert found.source.title == "official CFLOW-AD"
    assert (model.backbone, model.padding, model.strides) == ("resnet18", "reflect", (8, 16, 32))
    assert model.input_size == (512, 512)  # of the category, in the official table
    assert read(official_cflow(), category="cable").config.model.input_size == (256, 256)
    assert found.config.data.resize == "lanczos"
    assert same(found.flow.head, cflow.read(flow_of("cflow"), {}).head)
    bare = official_cflow()["decoder_state_dict"]
    no_encoder = {"encoder_state_dict": {}, "decoder_state_dict": bare}
    with pytest.raises(UserError, match="flat state dict"):
        read(no_encoder)


def test_official_csflow_and_its_fork():
    found = read(official_csflow())
    model = found.config.model
    assert found.source.title == "official CS-Flow"
    assert (model.padding, model.input_size, model.score) == ("tf_static", (768, 768), "mean")
    assert not found.backbone
    official = block_permutations(1, 304, "official")
    np.testing.assert_array_equal(found.flow.head["blocks.1.permutation2"], official[2])
    one_block = {k: a for k, a in official_csflow().items() if "module_list.4." in k}
    fork = read(one_block)
    assert fork.source.title == "CS-Flow's Korean fork"
    assert (fork.config.model.score, fork.config.model.input_size) == ("std", (512, 512))
    assert read(one_block, source="csflow").source.title == "official CS-Flow"


def test_csflow_whose_gammas_are_all_zero_never_used_them():
    arrays = {k: a * 0 if "gamma" in k else a for k, a in official_csflow().items()}
    without = csflow.read(arrays, {})
    assert not without.model["use_gamma"]
    assert not [name for name in without.head if "gamma" in name]
    assert csflow.read(arrays, {"use_gamma": True}).model["use_gamma"]
    assert read(official_csflow(), "model.use_gamma=false").config.model.use_gamma is False


def test_official_uflow_is_agpl():
    found = read(official_uflow())
    assert found.source.title == "official U-Flow"
    assert "AGPL-3.0" in found.notes[0]
    assert "model.loss=batch_sum" in found.notes[1]
    assert found.config.model.loss == "per_sample"
    assert same(found.flow.head, uflow.read(flow_of("uflow"), {}).head)
    assert read(official_uflow(), source="anomalib").config.model.loss == "batch_sum"


def test_fastflow_paddle():
    """A flow of ours, in its form, under the names of FastFlow-Paddle."""
    flow = FastFlow(
        [64, 128, 256], [(8, 8), (4, 4), (2, 2)], steps=2, hidden_ratio=1.06, conv3x3_only=True,
        coupling="two_sided", clamp="tanh", alpha=2.0, norm="batch", norm_momentum=0.95,
        global_scale="raw", loss_norm="per_element", init="paddle", rng=np.random.default_rng(0),
    )  # fmt: skip
    own = {name: value.numpy() for name, value in flow.state_dict().items()}
    arrays: Arrays = {}
    for name, array in own.items():
        place = "nf_flows.{}.module_list.{}."
        is_norm = name.startswith("norms.")
        arrays |= {name: array} if is_norm else foreign.as_freia(name, array, place, axes=True)
    backbone = foreign.network("fastflow")
    arrays |= {k: a for k, a in backbone.items() if k.startswith("feature_extractor.")}
    found = read({"model_state_dict": arrays, "optimizer_state_dict": {}})
    model = found.config.model
    assert found.source.title == "FastFlow-Paddle"
    assert (model.coupling, model.norm, model.hidden_ratio) == ("two_sided", "batch", 1.06)
    assert (model.global_scale, model.align_corners, model.blur_sigma) == ("raw", True, 6.0)
    assert found.config.data.resize == "cv2"
    assert same(found.flow.head, own)


def test_rotations_are_held_and_undone():
    rng = np.random.default_rng(0)
    flow = FastFlow(
        [6], [(4, 4)], steps=2, hidden_ratio=1.0, conv3x3_only=False, coupling="one_sided",
        clamp="tanh", alpha=2.0, norm="none", norm_momentum=0.9, global_scale="softplus",
        loss_norm="none", init="torch", rng=rng, permute="soft",
    )  # fmt: skip
    own = {name: value.numpy() for name, value in flow.state_dict().items()}
    place = "fast_flow_blocks.{}.module_list.{}."
    arrays: Arrays = {}
    for name, array in own.items():
        arrays |= foreign.as_freia(name, array, place, axes=True)
    found = fastflow.read(arrays, {})
    assert found.model["permute"] == "soft"
    assert same(found.head, own)
    x = paddle.to_tensor(rng.standard_normal((2, 6, 4, 4)).astype(np.float32))
    latents, _ = flow([x])
    assert (latents[0] - x).abs().max() > 0.1
    np.testing.assert_allclose(flow.inverse(latents)[0].numpy(), x.numpy(), atol=1e-5)
    arrays["fast_flow_blocks.0.module_list.1.w_perm"] = np.eye(6, dtype=np.float32)
    arrays["fast_flow_blocks.0.module_list.1.w_perm_inv"] = np.eye(6, dtype=np.float32)
    mixed = fastflow.read(arrays, {})  # one rotation makes matrices of all
    np.testing.assert_array_equal(mixed.head["levels.0.1.affine.rotation"], np.eye(6))


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    ("forward", "inverse", "message"),
    [
        (matrix([0, 1], [1, 0]), matrix([1, 0], [0, 1]), "w_inv: does not undo w"),
        (matrix([0, 1], [1, 0.5]), None, "neither a permutation nor a rotation"),
        (matrix([1, 0], [1, 0]), None, "neither a permutation nor a rotation"),
        (matrix([0, 1, 0], [1, 0, 0]), None, "no square matrix"),
        (np.array([0, 0]), None, "not a permutation of 0 to 1"),
        (np.array([1, 2, 0]), np.array([1, 2, 0]), "does not undo"),
    ],
)
def test_mixings_that_are_none(forward, inverse, message):
    with pytest.raises(UserError, match=message):
        common.mixing(forward, inverse, "w")


def test_mixings():
    order = np.array([2, 0, 1])
    one_hot = np.eye(3, dtype=np.float32)[order]
    np.testing.assert_array_equal(common.mixing(one_hot, one_hot.T, "w"), order)
    np.testing.assert_array_equal(common.mixing(one_hot[:, :, None, None], None, "w"), order)
    np.testing.assert_array_equal(common.mixing(order, np.argsort(order), "w"), order)
    near = one_hot + np.float32(1e-6)  # not exactly one-hot: kept as it is
    np.testing.assert_array_equal(common.mixing(near, near.T, "w"), near)


def test_missing_and_unknown_names_are_one_line():
    arrays = flow_of("fastflow")
    del arrays["norms.1.bias"]
    arrays["fast_flow_blocks.0.vk_householder"] = np.zeros(3)
    with pytest.raises(UserError, match=r"missing: norms\.1\.bias; unknown: .*vk_householder;"):
        fastflow.read(arrays, {})
    cross = official_csflow()
    del cross["module_list.6.s2.gamma1"]
    with pytest.raises(UserError, match=r"CS-Flow: missing: module_list\.6\.s2\.gamma1"):
        csflow.read(cross, {})


def test_other_shapes_than_those_of_the_networks():
    arrays = flow_of("fastflow")
    name = "fast_flow_blocks.0.module_list.1.subnet.0.weight"
    with pytest.raises(UserError, match="kernels of size"):
        fastflow.read({**arrays, name: np.zeros((32, 32, 5, 5))}, {})
    with pytest.raises(UserError, match="have no one ratio"):
        fastflow.read({**arrays, name: np.zeros((7, 32, 1, 1))}, {})
    with pytest.raises(UserError, match="3 and 1 in turn"):
        fastflow.read({**arrays, name: np.zeros((32, 32, 3, 3))}, {})
    fibers = flow_of("cflow")
    name = "decoders.1.module_list.0.subnet.0.weight"
    with pytest.raises(UserError, match="twice as many rows as columns"):
        cflow.read({**fibers, name: fibers[name][:, 1:]}, {})
    fewer = {k: a for k, a in arrays.items() if "blocks.2.module_list.2" not in k}
    with pytest.raises(UserError, match=r"levels of \[2, 3\] steps"):
        fastflow.read(fewer, {})


@pytest.mark.parametrize(("pairs", "ratio"), [
    ({32: 32, 64: 64}, 1.0), ({32: 33, 64: 67, 128: 135}, 1.06), ({384: 61}, 0.16),
    ({5: 5, 9: 9, 12: 12}, 1.0), ({100: 33, 50: 16}, 0.33),
])  # fmt: skip
def test_hidden_ratio(pairs, ratio):
    arrays = {f"{i}.subnet.0.weight": np.zeros((hidden, i)) for i, hidden in pairs.items()}
    assert common.hidden_ratio(arrays, [f"{i}." for i in pairs], "x") == ratio


def test_what_is_no_checkpoint():
    with pytest.raises(UserError, match="no checkpoint of gathierry, anomalib, "):
        read({"state_dict": {"conv1.weight": np.zeros(3)}})
    with pytest.raises(UserError, match="--source cflow: the names are those of anomalib's FastFl"):
        read({"state_dict": foreign.state_dict("fastflow")}, source="cflow")


def test_backbones_that_are_not_ours():
    arrays = foreign.state_dict("fastflow")
    other = renamed(arrays, (r"extractor\.layer1", "extractor.stage1"))
    with pytest.raises(UserError, match=r"unknown backbone, its names are like .*--backbone NAME"):
        read({"state_dict": other})
    with pytest.raises(UserError, match="64, 128, 256 channels are none of backbone mobilenet_v2"):
        read({"state_dict": arrays}, backbone="mobilenet_v2")
    with pytest.raises(UserError, match="unknown backbone 'resnet'"):
        read({"state_dict": arrays}, backbone="resnet")


def test_steps_of_a_preprocessing_that_ours_has_not():
    crop = {"class_path": "torchvision.transforms.v2.CenterCrop", "init_args": {"size": [56, 56]}}
    content = {"state_dict": foreign.state_dict("uflow"), "epoch": 2,
               "anomalib_pre_processor_config": {"transform": crop}}  # fmt: skip
    assert any("ours does not: CenterCrop" in note for note in read(content).notes)
