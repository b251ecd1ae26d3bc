"""Reading the pickles that Paddle writes (`.pdparams`, `.pdopt`) without executing anything."""

import codecs
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError

NAME_TABLE = "StructuredToParameterName@@"  # Paddle's own entry beside the weights


def load_pickle(path: Path) -> Any:
    """Read a file of nested dicts, lists, tuples, numbers, texts and numpy arrays.

    Raise `UserError` if it is damaged or names any other Python object; that object is not
    imported.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged stream can break the unpickler in any way
        raise UserError(
            f"{path}: not a complete .pdparams file ({type(error).__name__}); copy it again"
        ) from None


def read_pdparams(path: Path) -> dict[str, np.ndarray]:
    """Read a flat state dict, parameter name -> array."""
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a state dict is needed")
    arrays = {key: value for key, value in content.items() if key != NAME_TABLE}
    for key, value in arrays.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: entry {key!r} is not an array; a flat state dict is needed")
    return {key: value.view(np.ndarray) for key, value in arrays.items()}


class _Dtype:
    """Stand in for numpy.dtype, whose own unpickling believes whatever the file says."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.value = np.dtype(str(code))
        if self.value.kind not in "biufc":
            raise UserError(f"refused: arrays of type {code!r}; only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its type from `_Dtype` only."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise UserError("refused: an array without plain numbers")
        super().__setstate__((1, shape, dtype.value, is_fortran, data))


def _reconstruct(_subtype: object, _shape: object, _code: object) -> _Array:
    return np.zeros(0).view(_Array)  # the state follows


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.value, count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    if codecs.lookup(encoding).name != "iso8859-1":
        raise UserError(f"refused: encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever passed to _reconstruct
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle._Unpickler):
    # The version in Python: the one in C lets a few bytes of a file reserve gigabytes.

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"refused: the file asks for {module}.{name}, which weights do not need"
            )
        return _ALLOWED[module, name]
