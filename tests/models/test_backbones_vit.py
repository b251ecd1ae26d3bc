"""DeiT, CaiT and U-Flow's pair: numerics against numpy, sizes, weight files, export."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from safetensors.numpy import save_file

from models.backbones import BACKBONES, Backbone, build_backbone, weights
from models.backbones.base import Taps
from models.backbones.mcait import MultiScaleCait, bicubic_matrix
from models.backbones.vit import (
    Block,
    CaitM48,
    CaitS24,
    DeitBaseDistilled384,
    LayerScaleBlock,
    Transformer,
)
from models.backbones.weights import load_weights
from utils.errors import UserError

Arrays = dict[str, np.ndarray]
erf = np.vectorize(math.erf)


class TinyDeit(DeitBaseDistilled384):
    taps: ClassVar[Taps] = {16: (2, 12)}
    image_size, width, heads = 48, 12, 3


class TinyCait(CaitM48):
    taps: ClassVar[Taps] = {16: (3, 12)}
    image_size, width, heads = 64, 12, 3


class TinyCoarse(CaitS24):
    taps: ClassVar[Taps] = {16: (2, 8)}
    image_size, width, heads = 32, 8, 2


class TinyPair(MultiScaleCait):
    taps: ClassVar[Taps] = {16: (0, 12), 32: (1, 8)}
    fine, coarse = TinyCait, TinyCoarse


TINY = (TinyDeit, TinyCait)


def perturb(layer: nn.Layer, seed: int = 0) -> Arrays:
    """Move every parameter far from its start; return them in float64."""
    rng = np.random.default_rng(seed)
    for tensor in layer.parameters():
        noise = 0.4 * rng.standard_normal(tensor.shape)
        tensor.set_value((tensor.numpy() + noise).astype(np.float32))
    return {key: t.numpy().astype(np.float64) for key, t in layer.state_dict().items()}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def run(layer: nn.Layer, x: np.ndarray) -> list[np.ndarray]:
    with paddle.no_grad():
        output = layer(paddle.to_tensor(x))
    return [o.numpy() for o in (output if isinstance(output, list) else [output])]


def assert_close(value: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


def linear(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"] + state[f"{name}.bias"]


def layer_norm(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x: np.ndarray, state: Arrays, name: str, heads: int) -> np.ndarray:
    """Attend head by head for one image (N, C); talk between heads if the state says so."""
    size = x.shape[1] // heads
    q, k, v = np.split(linear(x, state, f"{name}.qkv"), 3, axis=1)
    cut = [slice(h * size, (h + 1) * size) for h in range(heads)]
    logits = [q[:, c] @ k[:, c].T / np.sqrt(size) for c in cut]
    logits = talk(logits, state, f"{name}.proj_l")
    attended = talk([softmax(a) for a in logits], state, f"{name}.proj_w")
    mixed = np.concatenate([a @ v[:, c] for a, c in zip(attended, cut, strict=True)], axis=1)
    return linear(mixed, state, f"{name}.proj")


def talk(maps: list[np.ndarray], state: Arrays, name: str) -> list[np.ndarray]:
    if f"{name}.weight" not in state:
        return maps
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]  # (heads in, heads out)
    heads = range(len(maps))
    return [sum((weight[i, o] * maps[i] for i in heads), bias[o] + 0 * maps[0]) for o in heads]


def block(x: np.ndarray, state: Arrays, name: str, heads: int) -> np.ndarray:
    """Run one block on one image (N, C)."""
    gamma1, gamma2 = (state.get(f"{name}gamma_{i}", 1.0) for i in (1, 2))
    x = x + gamma1 * attention(layer_norm(x, state, f"{name}norm1"), state, f"{name}attn", heads)
    y = linear(layer_norm(x, state, f"{name}norm2"), state, f"{name}mlp.fc1")
    y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    return x + gamma2 * linear(y, state, f"{name}mlp.fc2")


def transformer(image: np.ndarray, state: Arrays, kind: type[Transformer]) -> np.ndarray:
    """Run a network on one image (3, S, S); return (C, S / 16, S / 16)."""
    side = image.shape[1] // 16
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = [state[name][0, 0] for name in ("cls_token", "dist_token") if name in state]
    first = len(tokens)
    for row in range(side):
        for column in range(side):
            patch = image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            tokens.append((kernel * patch).sum((1, 2, 3)) + bias)
    x = np.stack(tokens) + state["pos_embed"][0]
    for index in range(kind.taps[16][0]):
        x = block(x, state, f"blocks.{index}.", kind.heads)
    x = layer_norm(x, state, "norm")[first:]
    return np.stack([x[row * side : (row + 1) * side].T for row in range(side)], axis=1)


@pytest.mark.parametrize("kind", [Block, LayerScaleBlock])
def test_block_equals_numpy(kind: type[nn.Layer]) -> None:
    layer = kind(12, 3) if kind is Block else kind(12, 3, 0.1)
    state = perturb(layer)
    assert ("attn.proj_l.weight" in state) == ("gamma_1" in state) == (kind is LayerScaleBlock)
    x = noise(2, 10, 12)
    assert_close(run(layer, x)[0], np.stack([block(one, state, "", 3) for one in x]))


@pytest.mark.parametrize("kind", TINY)
def test_network_equals_numpy(kind: type[Transformer]) -> None:
    network = kind([16])
    state = perturb(network)
    image = noise(2, 3, kind.image_size, kind.image_size)
    expected = np.stack([transformer(one, state, kind) for one in image])
    assert_close(run(network, image)[0], expected)


def test_start_values() -> None:
    """Keep the LayerScale of the papers; random embeddings are seeded, and no block is dead."""
    for kind, scale in ((CaitM48, 1e-6), (CaitS24, 1e-5)):
        assert kind.scale == scale
    network = TinyCait([16])
    load_weights(network, allow_random=True)
    state = network.state_dict()
    np.testing.assert_allclose(state["blocks.2.gamma_1"].numpy(), 1e-6)
    assert state["pos_embed"].numpy().std() == pytest.approx(0.02, rel=0.2)
    assert state["blocks.0.mlp.fc1.weight"].numpy().std() == pytest.approx(12**-0.5, rel=0.1)
    again = TinyCait([16])
    load_weights(again, allow_random=True)
    assert again.weight_hash == network.weight_hash


# network, blocks run, of, heads, tokens in front, published millions of the whole network (timm)
FULL = [
    (DeitBaseDistilled384, 8, 12, 12, 2, 87.63),
    (CaitM48, 41, 48, 16, 0, 356.46),
    (CaitS24, 21, 24, 8, 0, 46.92),
]


@pytest.mark.parametrize(("kind", "run_blocks", "blocks", "heads", "first", "published"), FULL)
def test_sizes(
    kind: type[Transformer],
    run_blocks: int,
    blocks: int,
    heads: int,
    first: int,
    published: float,
) -> None:
    """Count parameters, and add those of the unused rest to reach the published total."""
    with paddle.LazyGuard():  # no memory is taken
        network = kind([16])
    count = sum(math.prod(p.shape) for p in network.parameters())
    width, patches = network.channels[0], (kind.image_size // 16) ** 2
    per_block = 12 * width**2 + 13 * width  # qkv, projection, perceptron, two norms
    head = (width + 1) * 1000
    if first:
        rest = 2 * head  # class and distillation head
    else:
        rest = head + width + 2 * (per_block + 2 * width)  # class token and attention blocks
        per_block += 2 * width + 2 * (heads + 1) * heads  # LayerScale, talking heads
    embedding = (3 * 16**2 + 1) * width + first * width + (first + patches) * width
    assert count == embedding + run_blocks * per_block + 2 * width
    assert round((count + (blocks - run_blocks) * per_block + rest) / 1e6, 2) == published
    assert (len(network.blocks), network.heads) == (run_blocks, heads)
    assert (network.strides, network.default_strides) == ([16], (16,))
    assert BACKBONES[kind.name] is kind


def test_whole_cait_s24() -> None:
    network = build_backbone("cait_s24_224")
    load_weights(network, allow_random=True)
    (feature,) = run(network, noise(2, 3, 224, 224))
    assert feature.shape == (2, 384, 14, 14)
    assert feature.std(1) == pytest.approx(np.ones((2, 14, 14)), abs=1e-3)  # behind the norm
    alone = run(network, noise(2, 3, 224, 224)[1:])[0]
    assert_close(feature[1:], alone, 1e-5)


@pytest.mark.slow
def test_whole_deit() -> None:
    network = build_backbone("deit_base_distilled_384")
    load_weights(network, allow_random=True)
    (feature,) = run(network, noise(1, 3, 384, 384))
    assert feature.shape == (1, 768, 24, 24)
    assert feature.std(1) == pytest.approx(np.ones((1, 24, 24)), abs=1e-3)


@pytest.mark.parametrize("kind", [*TINY, TinyPair])
def test_nothing_trains(kind: type[Backbone]) -> None:
    network = kind(kind.default_strides)
    outer = nn.LayerList([network])
    perturb(network)
    size = getattr(kind, "image_size", 64)
    before = run(network, noise(1, 3, size, size))
    outer.train()
    for feature, expected in zip(run(network, noise(1, 3, size, size)), before, strict=True):
        np.testing.assert_array_equal(feature, expected)
    assert all(p.stop_gradient for p in network.parameters())
    assert all(f.stop_gradient for f in network(paddle.to_tensor(noise(1, 3, size, size))))


@pytest.mark.parametrize(
    ("name", "size"), [("deit_base_distilled_384", 384), ("cait_m48_448", 448), ("mcait", 448)]
)
def test_one_input_size_only(name: str, size: int) -> None:
    with paddle.LazyGuard():
        network = build_backbone(name)
    network.check_input_size(size, size)
    for height, width in ((256, 256), (size, size + 16)):
        with pytest.raises(UserError, match=rf"\[{height}, {width}\].*; use {size}$"):
            network.check_input_size(height, width)


def test_strides() -> None:
    for name, strides, known in (
        ("cait_m48_448", [4, 8, 16], "different ones of 16"),
        ("mcait", [16], "must be 16 and 32"),
        ("mcait", [8], "different ones of 16, 32"),
    ):
        with pytest.raises(UserError, match=f"backbone {name}: strides .*{known}"):
            build_backbone(name, strides)


def foreign(state: Arrays, *, transposed: bool, patch: str = "proj", prefix: str = "") -> Arrays:
    """Write a state as other projects do, with what they have behind the tapped block."""
    width = state["norm.weight"].shape[0]
    arrays = {
        prefix + key.replace("patch_embed.proj", f"patch_embed.{patch}"): np.ascontiguousarray(
            a.T if transposed and a.ndim == 2 else a, np.float32
        )
        for key, a in state.items()
    }
    behind = sum(key.endswith("attn.qkv.bias") for key in state)
    extra = {f"blocks.{behind}.norm1.bias": np.ones(width), "head.weight": np.ones((5, width))}
    if "cls_token" in state:
        extra["head_dist.bias"] = np.ones(5)
    else:
        extra |= {"cls_token": np.ones(width), "blocks_token_only.0.norm1.bias": np.ones(width)}
    return arrays | {prefix + key: a.astype(np.float32) for key, a in extra.items()}


@pytest.mark.parametrize("kind", TINY)
def test_weight_files_of_other_projects(kind: type[Transformer], tmp_path: Path) -> None:
    network = kind([16])
    state = perturb(network)
    image = noise(1, 3, kind.image_size, kind.image_size)
    expected = run(network, image)[0]
    forms = [
        {"transposed": True},  # timm
        {"transposed": False},  # PaddleClas
        {"transposed": False, "patch": "patch_embed", "prefix": "backbone."},  # PASSL
    ]
    hashes = set()
    for index, form in enumerate(forms):
        save_file(foreign(state, **form), tmp_path / f"{index}.safetensors")  # type: ignore[arg-type]
        loaded = kind([16])
        load_weights(loaded, tmp_path / f"{index}.safetensors")
        np.testing.assert_array_equal(run(loaded, image)[0], expected)
        hashes.add(loaded.weight_hash)
    assert len(hashes) == 1


def test_weight_file_that_does_not_fit(tmp_path: Path) -> None:
    network = TinyCait([16])
    arrays = foreign(perturb(network), transposed=False)
    for i in range(3):
        del arrays[f"blocks.{i}.gamma_1"]
    del arrays["norm.bias"]
    arrays["dist_token"] = arrays["blocks.2.attn.q.bias"] = np.ones(1, np.float32)
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        load_weights(network, tmp_path / "a.safetensors")
    assert str(caught.value).endswith(
        "missing blocks.0.gamma_1, blocks.1.gamma_1, blocks.2.gamma_1 and 1 more; "
        "unknown blocks.2.attn.q.bias, dist_token"
    )


@pytest.mark.parametrize(("large", "small"), [(448, 224), (64, 32), (37, 11), (5, 9)])
def test_bicubic_matrix_equals_interpolation(large: int, small: int) -> None:
    image = noise(1, 2, large, large)
    expected = F.interpolate(
        paddle.to_tensor(image), size=[small, small], mode="bicubic", align_corners=True
    ).numpy()
    matrix = bicubic_matrix(large, small)
    np.testing.assert_allclose(matrix.sum(1), 1)
    # Paddle's positions are float32, good to 3e-5 pixels at 447.
    assert_close(matrix @ image @ matrix.T, expected, 1e-4)


def test_pair_equals_its_parts() -> None:
    pair = TinyPair([16, 32])
    perturb(pair)
    assert (pair.strides, pair.channels) == ([16, 32], [12, 8])
    image = noise(2, 3, 64, 64)
    small = F.interpolate(
        paddle.to_tensor(image), size=[32, 32], mode="bicubic", align_corners=True
    ).numpy()
    fine, coarse = run(pair, image)
    assert fine.shape == (2, 12, 4, 4)
    np.testing.assert_array_equal(fine, run(pair.extractor1, image)[0])
    assert_close(coarse, run(pair.extractor2, small)[0], 1e-4)


def test_the_pair_of_the_paper() -> None:
    with paddle.LazyGuard():
        pair = build_backbone("mcait")
    assert (pair.strides, pair.channels) == ([16, 32], [768, 384])
    assert {prefix: part.name for prefix, part in pair.parts().items()} == {
        "extractor1.": "cait_m48_448",
        "extractor2.": "cait_s24_224",
    }
    assert pair.shrink.shape == [224, 448]
    assert not [key for key in pair.state_dict() if "shrink" in key]


def test_weights_of_the_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    (tmp_path / "bundled").mkdir()
    pair = TinyPair([16, 32])
    perturb(pair)
    image = noise(1, 3, 64, 64)
    expected = run(pair, image)
    whole: Arrays = {}
    for prefix, part in pair.parts().items():
        state = {key: t.numpy() for key, t in part.state_dict().items()}
        arrays = foreign(state, transposed=True)
        save_file(arrays, tmp_path / "bundled" / f"{part.name}.safetensors")
        whole |= {prefix + key: a for key, a in arrays.items()}
    save_file(whole, tmp_path / "whole.safetensors")

    hashes = []
    for source in (tmp_path / "whole.safetensors", None):
        loaded = TinyPair([16, 32])
        info = load_weights(loaded, source)
        for feature, value in zip(run(loaded, image), expected, strict=True):
            np.testing.assert_array_equal(feature, value)
        assert info.origin == ("bundled" if source is None else "file")
        hashes.append(loaded.weight_hash)
    assert hashes[0] == hashes[1] != ""
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in printed[-3:]] == [
        "backbone mcait",
        "backbone cait_m48_448",
        "backbone cait_s24_224",
    ]

    (tmp_path / "bundled" / "cait_s24_224.safetensors").unlink()
    info = load_weights(TinyPair([16, 32]), allow_random=True)
    assert info.origin == "random"
    assert info.source.endswith("cait_m48_448.safetensors and seed 0")

    with pytest.raises(UserError, match=r"begin with extractor1\. or extractor2\., unlike blocks"):
        load_weights(pair, tmp_path / "bundled" / "cait_m48_448.safetensors")


EXPORT = """
import sys
import numpy as np, paddle
from paddle.inference import Config, create_predictor
from paddle.static import InputSpec
from models.backbones import build_backbone
from tests.models import test_backbones_vit as tiny
folder, name = sys.argv[1:]
kind = getattr(tiny, name)
backbone = kind(kind.default_strides)
tiny.perturb(backbone)
size = getattr(kind, "image_size", 64)
spec = [InputSpec([None, 3, size, size], "float32", "image")]
static = paddle.jit.to_static(backbone, input_spec=spec, full_graph=True)
paddle.jit.save(static, folder + "/inference")
for mode, tolerance in (("plain", 3e-6), ("onednn", 1e-5)):
    config = Config(folder + "/inference.json", folder + "/inference.pdiparams")
    config.disable_gpu()
    config.enable_mkldnn() if mode == "onednn" else config.disable_mkldnn()
    predictor = create_predictor(config)
    for batch in (1, 3):
        image = np.random.default_rng(batch).standard_normal((batch, 3, size, size))
        image = paddle.to_tensor(image.astype("float32"))
        for a, b in zip(backbone(image), predictor.run([image]), strict=True):
            assert a.shape == b.shape
            error = float((a - b).abs().max() / a.abs().max())
            assert error < tolerance, (mode, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TinyDeit", "TinyCait", "TinyPair", "CaitS24"])
def test_exported_graph_equals_eager(tmp_path: Path, repo: Path, name: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), name],
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
