"""Paddle's pickles are read, and nothing in them is executed."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from utils.errors import UserError
from utils.safe_pickle import load_pickle, read_pdparams

ARRAYS = {
    "float": np.arange(12, dtype="float32").reshape(3, 4),
    "column_major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "bool": np.array([True, False]),
    "scalar_shape": np.array(7, dtype="int64"),
    "empty": np.zeros((0, 3), dtype="float32"),
    "complex": np.array([1 - 2j], dtype="complex64"),
}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_numpy_pickles(tmp_path: Path, protocol: int) -> None:
    arrays = read_pdparams(dump(tmp_path / "a.pdparams", ARRAYS, protocol))
    assert list(arrays) == list(ARRAYS)
    for key, expected in ARRAYS.items():
        assert type(arrays[key]) is np.ndarray
        assert arrays[key].dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(arrays[key], expected)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_what_paddle_saves(tmp_path: Path, protocol: int) -> None:
    layer = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.BatchNorm2D(4))
    adam = paddle.optimizer.Adam(
        paddle.optimizer.lr.StepDecay(0.1, 2), parameters=layer.parameters()
    )
    layer.eval()
    layer(paddle.ones([1, 3, 5, 5])).sum().backward()
    adam.step()
    path = tmp_path / "model.pdparams"
    paddle.save(layer.state_dict(), str(path), protocol=protocol)
    arrays = read_pdparams(path)
    assert set(arrays) == set(layer.state_dict())
    for key, tensor in layer.state_dict().items():
        np.testing.assert_array_equal(arrays[key], tensor.numpy())
    path = tmp_path / "nested.pdparams"
    paddle.save({"opt": adam.state_dict(), "epoch": 3, "best": np.float64(0.5)}, str(path))
    nested, _ = load_pickle(path)
    assert (nested["epoch"], nested["best"]) == (3, 0.5)
    assert nested["opt"]["LR_Scheduler"]["last_lr"] == 0.1
    moments = [key for key in nested["opt"] if "moment1" in key]
    assert len(moments) == 4
    name, value = nested["opt"][moments[0]]
    assert name == moments[0]
    np.testing.assert_array_equal(value, adam.state_dict()[moments[0]].numpy())


def test_reads_module_names_of_both_numpy_generations(tmp_path: Path) -> None:
    new = pickle.dumps(ARRAYS, protocol=2).replace(b"cnumpy.core.", b"cnumpy._core.")
    for data in (new, new.replace(b"cnumpy._core.", b"cnumpy.core.")):
        (tmp_path / "a.pdparams").write_bytes(data)
        arrays = read_pdparams(tmp_path / "a.pdparams")
        np.testing.assert_array_equal(arrays["float"], ARRAYS["float"])


def test_reads_arrays_of_python_2(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], dtype="<f4")
    data = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        + values.tobytes()
        + b"tbs."
    )
    (tmp_path / "a.pdparams").write_bytes(data)
    np.testing.assert_array_equal(read_pdparams(tmp_path / "a.pdparams")["w"], values)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Call(os.system, "touch {}"), r"system"),
        (Call(eval, "open('{}', 'w')"), r"builtins\.eval"),
        (Call(np.save, "{}", 1), r"numpy\.save"),
        (Call(Path, "{}"), r"pathlib"),
        (Call(getattr, OrderedDict, "__init__"), r"builtins\.getattr"),
    ],
)
def test_refuses_and_names_other_objects(tmp_path: Path, content: Call, named: str) -> None:
    victim = tmp_path / "victim"
    function, arguments = content.call
    filled = [a.format(victim) if isinstance(a, str) else a for a in arguments]
    path = dump(tmp_path / "a.pdparams", {"w": Call(function, *filled)})
    with pytest.raises(UserError, match=f"refused: the file asks for .*{named}") as caught:
        read_pdparams(path)
    assert not list(tmp_path.glob("victim*"))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_refuses_pointers_and_codecs(tmp_path: Path) -> None:
    reconstruct = np.empty(1).__reduce__()[0]

    class Forged:
        """An array of objects whose memory is text from the file."""

        def __init__(self, code: str, flags: int) -> None:
            self.state = (1, (1,), ForgedDtype(code, flags), False, b"A" * 8)

        def __reduce__(self) -> tuple[Any, ...]:
            return reconstruct, (np.ndarray, (0,), b"b"), self.state

    class ForgedDtype:
        def __init__(self, code: str, flags: int) -> None:
            self.code, self.flags = code, flags

        def __reduce__(self) -> tuple[Any, ...]:
            state = (3, "|", None, None, None, -1, -1, self.flags)
            return np.dtype, (self.code, False, True), state

    for hostile in (
        Forged("O8", 0),
        Forged("f4,O", 0),
        np.array([{}], dtype=object),
        Call(__import__("_codecs").encode, "cmd", "rot13"),
    ):
        with pytest.raises(UserError):
            read_pdparams(dump(tmp_path / "a.pdparams", {"w": hostile}))


def test_types_of_numpy_stay_as_they_are(tmp_path: Path) -> None:
    """A state for a class or function of the reader, or a view of memory, would outlive a file."""
    for forged in (
        b"cnumpy\ndtype\n(N}X\x05\0\0\0valueK\1stb",
        b"c_codecs\nencode\n(N}X\x0c\0\0\0__defaults__)stb",
        b"ccollections\nOrderedDict\n(N}X\x05\0\0\0itemsK\1stb",
    ):
        (tmp_path / "a.pdparams").write_bytes(b"\x80\x02}X\1\0\0\0w" + forged + b"s.")
        with pytest.raises(UserError, match=r"entry w \(\S+\) is not an array"):
            read_pdparams(tmp_path / "a.pdparams")
    array = pickle.dumps(np.arange(3), 2)[:-1]
    (tmp_path / "a.pdparams").write_bytes(array + b"\x98.")
    with pytest.raises(UserError, match="an instruction that files of weights do not need"):
        load_pickle(tmp_path / "a.pdparams")
    for key, expected in ARRAYS.items():
        arrays = read_pdparams(dump(tmp_path / "a.pdparams", {key: expected}))
        np.testing.assert_array_equal(arrays[key], expected)


def test_names_out_of_the_file_stay_in_one_line(tmp_path: Path) -> None:
    for name in ("a\nb", "x" * 10_000, "\x1b[2J"):
        with pytest.raises(UserError) as caught:
            read_pdparams(dump(tmp_path / "a.pdparams", {name: 1}))
        message = str(caught.value).removeprefix(str(tmp_path))
        assert message.isprintable()
        assert len(message) < 300


@pytest.mark.parametrize("content", [[1], {"w": 3}, {1: np.zeros(2)}, {"w": {"v": np.zeros(2)}}])
def test_wants_a_flat_state_dict(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match="state dict is needed"):
        read_pdparams(dump(tmp_path / "a.pdparams", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pdparams: cannot be read \(No such file"):
        read_pdparams(tmp_path / "a.pdparams")


def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    whole = pickle.dumps(ARRAYS, protocol=4)
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.pdparams: ") as caught:
            read_pdparams(path)
        assert "\n" not in str(caught.value)


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.pdparams"
    whole = np.frombuffer(pickle.dumps(ARRAYS, protocol=2), np.uint8)
    refused = 0
    for _ in range(1000):
        broken = whole.copy()
        places = rng.integers(0, len(whole), size=rng.integers(1, 4))
        broken[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(broken.tobytes())
        try:
            read_pdparams(path)
        except UserError:
            refused += 1
    assert refused > 300
