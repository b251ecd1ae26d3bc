"""Reading the pickles that Paddle writes (`.pdparams`, `.pdopt`) without executing anything."""

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from .errors import UserError
from .safe_arrays import NUMBERS, one_line, read_only_view, shown
from .stand_ins import Budget, Foreign, Known, Pending, StandIn, as_key, plain

NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own entry beside the weights
MAX_STEPS = 2_000_000  # reads of a pickle; one tensor takes about 80
REMEDY = "where you trust it, save the weights alone: paddle.save(layer.state_dict(), path)"


def load_pickle(path: Path) -> tuple[Any, list[str]]:
    """Read a file of nested dicts, lists, tuples, numbers, texts and numpy arrays (read-only).

    Return the content, and what is left out of it, such as types of numpy. Raise `UserError` if
    the file is damaged or names any other Python object; that object is not imported.
    """
    with one_line(path, ".pdparams"), path.open("rb") as file:
        size = path.stat().st_size
        budget = Budget(size)
        content = Reader(Stream(file, size), budget).load()
        return plain(content, budget, REMEDY)


def read_pdparams(path: Path) -> dict[str, np.ndarray]:
    """Read a flat state dict, parameter name -> array (read-only)."""
    content, skipped = load_pickle(path)
    if skipped:
        raise UserError(f"{path}: entry {skipped[0]} is not an array; a flat state dict is needed")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a state dict is needed")
    arrays = {key: value for key, value in content.items() if key != NAME_TABLE}
    for key, value in arrays.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise UserError(
                f"{path}: entry {shown(key)} is not an array; a flat state dict is needed"
            )
    return arrays


class Stream:
    """A file read in steps, of which none reaches over its end and there are not too many."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.steps = file, size, MAX_STEPS

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise UserError(f"cut off or damaged: {size} bytes announced, {self.left} are left")
        return self._took(self.file.read(size))

    def readline(self) -> bytes:
        return self._took(self.file.readline(self.left))

    def _took(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.steps -= 1
        if self.steps < 0:
            raise UserError("refused: its structure is too large for a file of weights")
        return data


class _Dtype(StandIn):
    def __init__(self, code: str, _align: bool = False, _copy: bool = False) -> None:
        if not NUMBERS.fullmatch(str(code)[:20]):
            raise UserError(f"refused: arrays of type {shown(code)}; only numbers are read")
        self.value = np.dtype(str(code))

    def set_state(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise UserError("refused: numbers in an unknown byte order")
        self.value = self.value.newbyteorder(state[1])


class _Array(Pending):
    state: tuple[Any, ...] = ()

    def set_state(self, state: Any) -> None:
        self.state = state[1:]

    def array(self, budget: Budget) -> np.ndarray:
        shape, dtype, is_fortran, data = self.state
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise UserError("refused: an array without plain numbers")
        budget.spend(len(data))
        array = read_only_view(data, dtype.value, shape[::-1] if is_fortran else shape)
        if array.nbytes != len(data):
            raise UserError(f"damaged: an array of shape {shape} in {len(data)} bytes")
        return array.T if is_fortran else array


def _reconstruct(*_: object) -> _Array:
    return _Array()  # the state follows


def _from_buffer(data: bytes, dtype: _Dtype, shape: Any, order: str) -> _Array:
    array = _Array()
    array.set_state((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: _Dtype, data: Any) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return read_only_view(bytes(data), dtype.value, ()).item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise UserError(f"refused: encoding {shown(encoding)}")
    return text.encode("latin1")


def make_bytes(*content: Any) -> bytes:
    """Stand in for bytes and bytearray."""
    if len(content) == 2:
        return _encode(*content)
    if content and not isinstance(content[0], bytes):
        raise UserError("refused: bytes made of something else")
    return content[0] if content else b""


def make_dict(*pairs: Any) -> dict[Any, Any]:
    """Stand in for dict and its relatives."""
    made: dict[Any, Any] = {}
    for source in pairs:
        items = source.items() if isinstance(source, dict) else source
        made |= {as_key(key): value for key, value in items}
    return made


def collection(kind: type) -> Callable[..., Any]:
    """Return what stands in for list, tuple, set or frozenset."""

    def build(*content: Any) -> Any:
        items = content[0] if content else ()
        if not isinstance(items, list | tuple | set | frozenset):
            raise UserError(f"refused: a {kind.__name__} made of something else")
        return kind(map(as_key, items)) if kind in (set, frozenset) else kind(items)

    return build


NUMPY: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): make_dict,
    ("builtins", "tuple"): collection(tuple),
    ("builtins", "bytes"): make_bytes,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): build
        for core in ("core", "_core")
        for module, name, build in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2


class Reader(pickle._Unpickler):
    """Read one pickle; only what `known` and `foreign` name can be in it.

    The version in Python: the one in C lets a few bytes of a file reserve gigabytes. Everything
    that calls, or that changes an object, is replaced by what works on our own types alone.
    """

    known: Mapping[tuple[str, str], Callable[..., Any]] = NUMPY
    remedy = REMEDY
    # What pickle leaves untyped.
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    stack: list[Any]
    memo: dict[int, Any]

    def __init__(self, stream: Stream, budget: Budget) -> None:
        super().__init__(stream, encoding="latin1")
        self.budget = budget

    def foreign(self, module: str, name: str) -> Foreign | None:
        """Return the stand-in of an object that is harmless but not rebuilt."""
        return Foreign("numpy.ndarray") if (module, name) == ("numpy", "ndarray") else None

    def find_class(self, module: str, name: str) -> Foreign:
        module = RENAMED.get(module, module)
        full = shown(f"{module}.{name}", 200)
        if build := self.known.get((module, name)):
            return Known(full, build)
        if found := self.foreign(module, name):
            return found
        raise UserError(
            f"refused: the file asks for {full}, which weights do not need; {self.remedy}"
        )

    def call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        if not isinstance(function, Foreign) or not isinstance(arguments, tuple):
            raise UserError("refused: a call of something that cannot be called")
        if not isinstance(function, Known):
            self.append(Foreign(function.name))
            return
        for argument in arguments:
            if isinstance(argument, str | bytes | list | tuple | dict | set | frozenset):
                self.budget.spend(len(argument) * (1 if isinstance(argument, str | bytes) else 8))
        self.append(function.build(*arguments, **(keywords or {})))

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(as_key, items))
        elif not isinstance(target, Foreign):
            raise UserError("refused: something is added to what is no list")

    def insert(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((as_key(key), value) for key, value in pairs)
        elif not isinstance(target, Foreign):
            raise UserError("refused: an entry is set in what is no dict")

    def load_refused(self) -> None:
        raise UserError("refused: an instruction that files of weights do not need")

    def load_frame(self) -> None:
        self.read(8)  # a hint for buffers only

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    def load_put(self) -> None:
        self.memo[int(self.readline()[:9])] = self.stack[-1]

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.call(self.stack.pop(), arguments, keywords)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.call(self.find_class(module, name), tuple(self.pop_mark()))

    def load_obj(self) -> None:
        function, *arguments = self.pop_mark()
        self.call(function, tuple(arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].set_state(state)
        elif not isinstance(self.stack[-1], dict):  # an OrderedDict's: PyTorch's _metadata
            raise UserError("refused: a state for something that has none")

    def load_append(self) -> None:
        item = self.stack.pop()
        self.extend(self.stack[-1], [item])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self.extend(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.insert(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.insert(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.insert(self.stack[-1], items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # sets what append is
        self.append(frozenset(map(as_key, items)))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.FRAME[0]: load_frame,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.PUT[0]: load_put,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.INST[0]: load_inst,
        pickle.OBJ[0]: load_obj,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.PERSID[0]: load_refused,
        pickle.EXT1[0]: load_refused,
        pickle.EXT2[0]: load_refused,
        pickle.EXT4[0]: load_refused,
        pickle.NEXT_BUFFER[0]: load_refused,
        pickle.READONLY_BUFFER[0]: load_refused,
    }
