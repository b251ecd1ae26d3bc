"""Whatever PyTorch writes is read bit for bit, and it reads what is written here."""

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.utils.torch_cases import assert_same
from utils.torch_file import read_torch, write_torch
from utils.torch_tensors import DTYPES

torch = pytest.importorskip("torch", reason="PyTorch is not installed; stored files are tested")
CASES = 200  # for each form
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 3, 4), (1, 2, 1, 3))


def as_numpy(value: Any) -> Any:
    """Return what `read_torch` should make of `value`."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
    if isinstance(value, torch.device | torch.dtype | torch.layout):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: as_numpy(entry) for key, entry in value.items()}
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, deque):
        return [as_numpy(entry) for entry in value]
    if isinstance(value, list | tuple):
        return type(value)(as_numpy(entry) for entry in value)
    return bytes(value) if isinstance(value, bytearray) else value


def draw_tensor(rng: random.Random, known: list[Any]) -> Any:
    """Make a tensor of random bits, or a view or part of one that was made before."""
    if known and rng.random() < 0.4:
        return draw_view(rng, rng.choice(known))
    dtype = getattr(torch, rng.choice(list(DTYPES)))
    shape = rng.choice(SHAPES)
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    data = torch.tensor(list(rng.randbytes(count)), dtype=torch.uint8)
    data = data > 127 if dtype == torch.bool else data.view(dtype)
    tensor = data.reshape(shape).clone()
    if tensor.is_floating_point() and rng.random() < 0.3:
        tensor = torch.nn.Parameter(tensor, requires_grad=rng.random() < 0.5)
        if rng.random() < 0.3:
            tensor.note = "a Parameter with a state"
    known.append(tensor)
    return tensor


def draw_view(rng: random.Random, tensor: Any) -> Any:
    changes = [
        lambda t: t,
        lambda t: t.T if t.dim() == 2 else t.flatten()[1:],
        lambda t: t.expand(2, *t.shape),
        lambda t: t[..., ::2] if t.dim() else t,
        lambda t: t.transpose(0, -1) if t.dim() else t,
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten()[2:4],
        lambda t: t.conj() if t.is_complex() else t,
        lambda t: t.clone().conj().imag if t.is_complex() else t,  # a negated view
    ]
    return rng.choice(changes)(tensor.detach() if rng.random() < 0.9 else tensor)


def draw(rng: random.Random, known: list[Any], depth: int = 0) -> Any:
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 5:
        return draw_tensor(rng, known)
    if kind < 8:
        return rng.choice(plain_values(rng))
    children = [draw(rng, known, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return rng.choice([list, tuple, deque])(children)
    keys = rng.sample(["a", "weight.0", "ö", 7, -1, 2.5, None, True, b"k", "state_dict"], 4)
    pairs = list(zip(keys, children, strict=False))
    return defaultdict(list, pairs) if kind == 9 else (dict, OrderedDict)[kind % 2](pairs)


def plain_values(rng: random.Random) -> list[Any]:
    return [
        None, True, rng.random(), -rng.getrandbits(90), rng.getrandbits(20), "text " * 60, "é\n",
        b"bytes", bytearray(b"more"), complex(1, -2), {1, 2}, frozenset({"x"}), float("inf"),
        Counter("aab"), torch.Size([2, 3]), torch.device("cpu"), torch.device("cuda", 1),
        torch.float16, torch.strided, np.float32(rng.random()), np.int64(3), np.bool_(True),
        np.arange(rng.randrange(5)).astype(rng.choice(["f4", "i8", ">f8", "?", "c8"])),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(2.5, "f2"), np.zeros((0, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_what_pytorch_writes(tmp_path: Path, zipped: bool) -> None:
    path, tensors = tmp_path / "a.pt", 0
    for seed in range(CASES):
        rng = random.Random(seed)
        known: list[Any] = []
        content = {"root": draw(rng, known), "more": [draw(rng, known), draw(rng, known)]}
        torch.save(
            content,
            path,
            pickle_protocol=rng.choice([2, 3, 4, 5]),
            _use_new_zipfile_serialization=zipped,
        )
        read, skipped = read_torch(path)
        native = as_native(as_numpy(content))
        assert_same(read, native)
        assert not skipped
        tensors += len(known)
    assert tensors > 200


def as_native(value: Any) -> Any:
    """Arrays of numpy keep their byte order in a pickle; what is read is the machine's."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, dict):
        return {key: as_native(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_native(entry) for entry in value)
    return value


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("method", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"])
def test_modules_and_optimizers(tmp_path: Path, zipped: bool, method: str) -> None:
    nn = torch.nn
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 6)), nn.LayerNorm(6), nn.Linear(6, 2),
    )  # fmt: skip
    model.register_buffer("order", torch.randperm(7))
    options = {"momentum": 0.9} if method == "SGD" else {}
    optimizer = getattr(torch.optim, method)(model.parameters(), lr=0.01, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(2):
        model(torch.rand(5, 3, 4, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    content = {
        "model": model.half().state_dict() if method == "SGD" else model.state_dict(),
        "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": 2,
        "rng": torch.get_rng_state(),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read, skipped = read_torch(tmp_path / "a.pt")
    assert_same(read, as_numpy(content))
    assert not skipped


def test_pytorch_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, (2, 3)).astype(name) for name in DTYPES if name != "bfloat16"
    }
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((0, 3)), "turned": arrays["int8"].T}
    extra = {"epoch": 3, "names": ["a", ("b", None)], "rate": 0.1, "more": {"x": True}}
    path = tmp_path / "a.pt"
    for mapped in (False, True):
        write_torch(path, arrays)
        assert_same(as_numpy(torch.load(path, weights_only=True, mmap=mapped)), arrays)
        write_torch(path, arrays, extra)
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert_same(as_numpy(loaded.pop("state_dict")), arrays)
        assert loaded == extra
    layer = torch.nn.Linear(3, 2)
    write_torch(path, {"weight": np.ones((2, 3), "f4"), "bias": np.zeros(2, "f4")})
    layer.load_state_dict(torch.load(path, weights_only=True))
    assert layer(torch.ones(3)).tolist() == [3, 3]


def test_files_of_both_kinds_of_sums(tmp_path: Path) -> None:
    content = {"w": torch.rand(50), "e": torch.zeros(0)}
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(content, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_torch(tmp_path / "a.pt")[0], as_numpy(content))
