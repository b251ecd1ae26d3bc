"""What a file of weights is, is found in its content; every other file gives one line."""

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from tests.utils import torch_cases as made
from tests.utils.torch_cases import assert_same
from utils.errors import UserError
from utils.torch_file import write_torch
from utils.weight_file import read_weight_file, tensors

ARRAYS = {
    "conv.weight": np.arange(12, dtype="f4").reshape(3, 4),
    "half": np.arange(3, dtype="f2"),
    "count": np.array(7, dtype="i8"),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), "f4"),
}


def write(path: Path, form: str, arrays: dict[str, np.ndarray]) -> Path:
    if form == "safetensors":
        save_file(arrays, path, metadata={"format": "np"})
    elif form == "npz":
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    elif form == "pdparams":
        paddle.save({name: paddle.to_tensor(array) for name, array in arrays.items()}, str(path))
    else:
        write_torch(path, arrays)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weight_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", ["safetensors", "npz", "pdparams", "torch"])
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.npz", "a.pdparams", "a.pth", "a"])
def test_the_content_decides(tmp_path: Path, form: str, name: str) -> None:
    path = write(tmp_path / name, form, ARRAYS)
    file = read_weight_file(path)
    assert (file.path, file.form, file.skipped) == (path, form, [])
    read = tensors(file.content)
    assert set(read) == set(ARRAYS)
    assert_same({key: read[key] for key in ARRAYS}, ARRAYS)
    assert not any(array.flags.writeable for array in read.values())


def test_the_form_before_1_6(tmp_path: Path) -> None:
    path = made.legacy_file(tmp_path / "a.pt", made.dict_of(w=made.tensor()))
    file = read_weight_file(path)
    assert file.form == "torch (before 1.6)"
    assert_same(tensors(file.content), {"w": np.array([1, 2, 3, 4], "f4")})


def tar_of_old_times(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def zip_of_texts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("read.me", "x")


STRAYS: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty; copy it again"),
    "page": (b"\n<!DOCTYPE html><html>404</html>", "looks like a web page; download it again"),
    "xml": (b"<?xml version='1.0'?><Error/>", "looks like a web page; download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "text": (b'{"weights": [1, 2, 3]}\n', "is a text and no file of weights: PyTorch"),
    "random": (np.random.default_rng(0).bytes(5000), "is no file of weights, or its beginning"),
    "tar": (tar_of_old_times, "is a tar archive.* save its state dict with torch.save"),
    "zip": (zip_of_texts, "a zip archive, but neither of torch.save nor of numpy.savez"),
    "broken zip": (b"PK\3\4" + bytes(400), "not a whole weight file"),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    content, reason = STRAYS[kind]
    path = tmp_path / "a.pt"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_weight_file(path)
    refusal(path)


def test_no_file(tmp_path: Path) -> None:
    assert "is a folder; a file of weights is needed" in refusal(tmp_path)
    assert "no such file; it should hold weights: PyTorch" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["safetensors", "npz", "pdparams", "torch"])
def test_every_cut_gives_one_line(tmp_path: Path, form: str) -> None:
    whole = write(tmp_path / "a", form, ARRAYS).read_bytes()
    for length in range(0, len(whole) - 1, 11):
        (tmp_path / "a").write_bytes(whole[:length])
        refusal(tmp_path / "a")


def test_the_state_dict_is_found() -> None:
    state, other = {"w": np.zeros(2)}, {"v": np.ones(3)}
    for name in ("state_dict", "model_state_dict", "model", "net"):
        assert tensors({"epoch": 1, name: state, "zzz": other}) == state
    assert tensors({"net": other, "state_dict": state, "epoch": 1}) is not other
    assert list(tensors({"net": other, "state_dict": state, "epoch": 1})) == ["w"]
    parts = {"decoders": [state, other], "encoder": {"inner": other}}
    assert list(tensors(parts, at=["decoders", "1"])) == ["v"]
    assert list(tensors(parts, at=["encoder", "inner"])) == ["v"]
    paddle_names = {"w": ("w_0", state["w"]), "StructuredToParameterName@@": {"w": "w_0"}}
    assert list(tensors(paddle_names)) == ["w"]
    assert tensors(paddle_names)["w"] is state["w"]


def test_what_is_there_is_listed_where_no_state_dict_is() -> None:
    content = {"epoch": 3, "w": np.zeros((2, 3), "f4"), "parts": [{}, 1], "name": "x"}
    with pytest.raises(UserError, match=r"needed.*: epoch \(int\), w \(float32 \[2, 3\]\), parts"):
        tensors(content)
    with pytest.raises(UserError, match=r"the file has no entry nets; there are: epoch \(int\), "):
        tensors(content, at=["nets"])
    with pytest.raises(UserError, match=r"parts has no entry 2; there are: 0 \(dict of 0\), 1 "):
        tensors(content, at=["parts", "2"])
    with pytest.raises(UserError, match=r"there are: no entries, but a int"):
        tensors(content, at=["epoch"])
    with pytest.raises(UserError, match=r"there are: no entries$"):
        tensors({})
    many = {str(number): number for number in range(30)}
    with pytest.raises(UserError, match=r"5 \(int\) and 24 more$"):
        tensors(many)
    for key in ("a\nb", "x" * 10_000):
        with pytest.raises(UserError) as caught:
            tensors({key: 1})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_bfloat16_of_safetensors_becomes_float32(tmp_path: Path) -> None:
    header = {"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
    write_safetensors(tmp_path / "a", header, np.array([0x3F80, 0xC000, 1], "<u2").tobytes())
    wanted = np.array([0x3F800000, 0xC0000000, 0x00010000], np.uint32).view(np.float32)
    assert_same(tensors(read_weight_file(tmp_path / "a").content), {"w": wanted})


def write_safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


def entry(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"w": entry(0, 8, (2,), "F8_E4M3")}, "entry w is of type F8_E4M3"),
        ({"w": entry(0, 8, (3,))}, "entry w has another size than its shape says"),
        ({"w": entry(0, 80, (20,))}, "entry w should be bytes 0 to 80 of 8"),
        ({"w": entry(0, 8, (2,)), "v": entry(0, 8, (2,))}, "should be bytes 0 to 8 of 8"),
        ({"w": entry(0, 4)}, "4 bytes belong to no entry"),
        ({"w": entry(4, 8)}, "should be bytes 4 to 8 of 8"),
        ({"w": entry(0, -1)}, "should be bytes 0 to -1"),
        ({"w": entry(0, 8, (1 << 62, 1 << 62))}, "without a proper shape"),
        ({"w": entry(0, 8, (2,), "F64")}, "entry w has another size"),
        ({"w": {"dtype": "F32"}}, "not a whole .safetensors file"),
        ({"w": entry(0, 8, (1,) * 40)}, "without a proper shape"),
        (b'{"w": ' + b"[" * 100_000, "not a whole .safetensors file"),
        (b"{", "not a whole .safetensors file"),
    ],
)
def test_forged_safetensors(tmp_path: Path, header: Any, reason: str) -> None:
    assert reason in refusal(write_safetensors(tmp_path / "a", header, bytes(8)))


def test_announced_headers_are_not_believed(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a", b"{}", b"", 16 << 20)
    tracemalloc.start()
    assert "a header of 16777216 bytes; 2 are there" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def npz(path: Path, header: bytes, data: bytes = bytes(8), **options: Any) -> Path:
    entry = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("w.npy", entry)
    return path


def describe(code: str = "'<f4'", shape: str = "(2,)") -> bytes:
    return f"{{'descr': {code}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (describe("'|O'"), "w.npy holds |O; only numbers are read"),
        (describe("'<U9'"), "w.npy holds <U9; only numbers are read"),
        (describe("[('a', '<f4')]"), "only numbers are read"),
        (describe(shape="(3,)"), "w.npy has another size than it announces"),
        (describe(shape="(1,)"), "w.npy has another size than it announces"),
        (describe(shape="(1000000000000,)"), "w.npy announces 4000000000000 bytes"),
        (describe(shape=f"({'9' * 30},)"), "without a proper shape"),
        (describe(shape="(-1,)"), "w.npy is not what numpy writes"),
        (describe(shape="(__import__('os'),)"), "w.npy is not what numpy writes"),
        (b"{" * 9000, "w.npy is not what numpy writes"),
        (b"", "w.npy is not what numpy writes"),
    ],
)
def test_forged_npz(tmp_path: Path, header: bytes, reason: str) -> None:
    assert reason in refusal(npz(tmp_path / "a", header))


def test_npz_that_unpacks_to_much_more(tmp_path: Path) -> None:
    """A tenth of a megabyte that would be a hundred."""
    path = npz(
        tmp_path / "a", describe(shape="(25000000,)"), bytes(100_000_000),
        compression=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    assert path.stat().st_size < 110_000
    tracemalloc.start()
    assert "would unpack to over 100 times its size" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_npz_whose_directory_lies(tmp_path: Path) -> None:
    """The table of contents says little, the entry itself unpacks to much."""
    path = npz(
        tmp_path / "a", describe(shape="(25000000,)"), bytes(100_000_000),
        compression=zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = struct.pack("<I", 1_000_000)
    path.write_bytes(data)
    tracemalloc.start()
    assert "announces 100000000 bytes" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_large_arrays(tmp_path: Path, save: Any) -> None:
    wanted = np.random.default_rng(0).integers(0, 256, 9 << 20, dtype="u1")
    save(tmp_path / "a.npz", w=wanted)
    assert_same(read_weight_file(tmp_path / "a.npz").content, {"w": wanted})


def test_npz_in_the_order_of_fortran(tmp_path: Path) -> None:
    wanted = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    np.savez(tmp_path / "a.npz", w=wanted)
    assert_same(tensors(read_weight_file(tmp_path / "a.npz").content)["w"], wanted.astype("i4"))


def test_archives_with_an_endless_table_of_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(200):
            archive.writestr(f"{number}{'x' * 60_000}", b"")
    assert "the table of contents of the archive is too long" in refusal(path)
