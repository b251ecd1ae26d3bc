"""What the pickle in a PyTorch file is made of: storages, views of them, and inert stand-ins."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError
from .safe_arrays import BFLOAT16, check_shape, read_only_view, shown
from .safe_pickle import NUMPY, Reader, Stream, collection, make_bytes, make_dict
from .stand_ins import Budget, Foreign, Label, Pending

# torch.<name> -> ours; bfloat16 becomes float32, what numpy lacks is refused.
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"), "float32": np.dtype("<f4"), "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16, "int64": np.dtype("<i8"), "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"), "int8": np.dtype("i1"), "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"), "uint16": np.dtype("<u2"), "uint8": np.dtype("u1"),
    "bool": np.dtype("?"), "complex64": np.dtype("<c8"), "complex128": np.dtype("<c16"),
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
# Libraries whose objects lie beside the weights in checkpoints: they are named and left out.
LIBRARIES = {
    "torch", "torchvision", "torchmetrics", "lightning", "lightning_fabric", "lightning_utilities",
    "pytorch_lightning", "anomalib", "omegaconf", "jsonargparse", "timm", "FrEIA",
    "argparse", "collections", "datetime", "enum", "functools", "pathlib", "typing",
}  # fmt: skip
HARMLESS = {
    "builtins": {"bool", "float", "int", "object", "range", "slice", "str"},
    "numpy": {"bool", "bool_", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "numpy.random": {"RandomState", "Generator", "MT19937", "PCG64"},
    "numpy.random._pickle": {"__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"},
    "numpy.random._mt19937": {"MT19937"},
    "numpy.random._pcg64": {"PCG64"},
}  # fmt: skip
CONVERT = "convert it in PyTorch with .to_dense(), .dequantize() or .float() and save again"


@dataclass
class Storage:
    """The bytes that tensors are views of, as the file holds them."""

    size: int
    itemsize: int
    data: bytes = b""
    is_big_endian: bool = False


class _DType(Label):
    def __init__(self, name: str) -> None:
        super().__init__(f"torch.{name}")
        self.dtype = DTYPES[name]


class _StorageType(Foreign):
    def __init__(self, name: str) -> None:
        super().__init__(f"torch.{name}")
        self.dtype = DTYPES[STORAGES[name]]


class _View(Foreign):
    """A storage or a part of it, as elements of one type."""

    def __init__(self, storage: Storage, kind: _StorageType, start: int, count: int) -> None:
        super().__init__(kind.name)
        self.storage, self.dtype = storage, kind.dtype
        self.start, self.end = (n * kind.dtype.itemsize for n in (start, start + count))


@dataclass
class _Tensor(Pending):
    view: _View
    dtype: np.dtype
    offset: int  # elements, as in strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    marks: dict[Any, Any]  # of lazy conjugation and negation

    def array(self, budget: Budget) -> np.ndarray:
        grown = self.dtype.itemsize * (2 if self.dtype == BFLOAT16 else 1)
        budget.spend(math.prod(self.shape) * grown)
        storage = self.view.storage
        dtype = self.dtype.newbyteorder(">") if storage.is_big_endian else self.dtype
        data = memoryview(storage.data)[self.view.start : self.view.end]
        offset = self.offset * dtype.itemsize
        array = read_only_view(data, dtype, self.shape, self.strides, offset)
        for mark, change in (("conj", np.conj), ("neg", np.negative)):
            if self.marks.get(mark):
                array = np.asarray(change(array))
                array.flags.writeable = False
        return array


def _tensor(
    view: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None, marks: Any = None
) -> _Tensor:
    """Stand in for torch._utils._rebuild_tensor."""
    if dtype is not None and not isinstance(dtype, _DType):
        raise UserError(f"refused: a tensor of {getattr(dtype, 'name', 'no type')}; {CONVERT}")
    if not isinstance(view, _View):
        raise UserError("damaged: a tensor without a storage")
    for sizes in (shape, strides, (offset,)):
        check_shape(sizes)
    kind = dtype.dtype if dtype else view.dtype
    return _Tensor(view, kind, offset, tuple(shape), tuple(strides), dict(marks or {}))


def _tensor_v2(
    view: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, marks: Any = None
) -> _Tensor:
    return _tensor(view, offset, shape, strides, None, marks)


def _tensor_v3(
    view: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, *more: Any
) -> _Tensor:
    return _tensor(view, offset, shape, strides, *more)  # dtype, marks


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, _Tensor | Foreign):
        raise UserError("damaged: a parameter without a tensor")
    return data


def _from_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """Rebuild a tensor that has further attributes; one of a subclass is foreign."""
    builders = {
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
    }
    build = builders.get(getattr(function, "name", ""))
    name = getattr(kind, "name", "nothing")
    return build(*arguments) if build and name == "torch.Tensor" else Foreign(name)


def _device(kind: Any, index: Any = None) -> str:
    return shown(kind if index is None else f"{kind}:{index}")


def _instance(kind: Any, *_: Any) -> Foreign:
    return Foreign(getattr(kind, "name", "an object"))


TORCH: dict[tuple[str, str], Callable[..., Any]] = {
    **NUMPY,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch", "Size"): collection(tuple),
    ("torch", "device"): _device,
    ("torch.serialization", "_get_layout"): shown,
    ("copyreg", "_reconstructor"): _instance,
    ("collections", "Counter"): make_dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("collections", "deque"): lambda items=(), _longest=None: list(items),
    ("builtins", "dict"): make_dict,
    ("builtins", "list"): collection(list),
    ("builtins", "set"): collection(set),
    ("builtins", "frozenset"): collection(frozenset),
    ("builtins", "bytearray"): make_bytes,
    ("builtins", "complex"): complex,
}


class TorchReader(Reader):
    """Read one pickle of a PyTorch file of `size` bytes; collect the storages it refers to."""

    known = TORCH
    remedy = "where you trust it, save the weights alone: torch.save(model.state_dict(), path)"

    def __init__(self, stream: Stream, budget: Budget, size: int) -> None:
        super().__init__(stream, budget)
        self.storages: dict[str, Storage] = {}
        self.size = size

    def foreign(self, module: str, name: str) -> Foreign | None:
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return _StorageType(name)
        if module == "torch" and name in DTYPES:
            return _DType(name)
        full = shown(f"{module}.{name}", 200)
        if module in ("torch._utils", "torch._tensor") and name.startswith("_rebuild"):
            raise UserError(f"refused: a tensor made by {full}; {CONVERT}")
        is_known = module.partition(".")[0] in LIBRARIES or name in HARMLESS.get(module, ())
        return Foreign(full) if is_known else super().foreign(module, name)

    def persistent_load(self, pid: Any) -> Foreign:
        if not isinstance(pid, tuple) or len(pid) not in (4, 5, 6):
            raise UserError("damaged: a reference to something else than a storage")
        if pid[0] == "module" and isinstance(pid[1], Foreign):  # a class with its source
            return pid[1]
        _storage, kind, key, _device, count, *view = pid
        if not isinstance(kind, _StorageType):
            raise UserError(f"refused: numbers of {getattr(kind, 'name', 'no type')}; {CONVERT}")
        start, part = (0, count) if not view or view[0] is None else view[0][1:]
        check_shape((count, start, part))
        storage = Storage(count * kind.dtype.itemsize, kind.dtype.itemsize)
        if shown(key) not in self.storages:
            self.size -= storage.size
            if self.size < 0:
                raise UserError("cut off or damaged: its arrays are larger than the file")
        known = self.storages.setdefault(shown(key), storage)
        if known.size != storage.size or known.itemsize != storage.itemsize:
            raise UserError(f"damaged: storage {shown(key)} has several sizes")
        return _View(known, kind, start, part)
