"""Reading and writing PyTorch's files without PyTorch; nothing in them is executed."""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import UserError
from .files import atomic_replace
from .safe_arrays import Archive, one_line, open_zip, shown
from .safe_pickle import Stream
from .stand_ins import Budget, plain
from .torch_tensors import DTYPES, STORAGES, TorchReader

MAGIC = 0x1950A86A20F9469CFC6C  # first in files of torch.save before 1.6
PROTOCOL = 1001
MAX_BITS = 2032  # of a whole number in LONG1
ALIGNMENT = 64  # bytes, of every array in a file, as in torch.save


def read_torch(path: Path) -> tuple[Any, list[str]]:
    """Read what `torch.save` wrote, in the zip form or the one before 1.6.

    Return nested dicts, lists and tuples of arrays and plain values, and what is left out of it:
    objects of other libraries, as `path.to.the.entry (module.Class)`. Arrays are read-only, as
    those of one storage share memory; bfloat16 becomes float32. Memory is needed for the file,
    and for the arrays that are converted. Raise `UserError` if the file is damaged, needs code to
    be read, or holds tensors that are sparse or of a type that numpy lacks.
    """
    with one_line(path, "PyTorch"):
        size = path.stat().st_size
        budget = Budget(size)
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                file.seek(0)
                return plain(_read_legacy(file, budget, size), budget, TorchReader.remedy)
        with open_zip(path) as archive:
            return plain(_read_zip(archive, budget, size), budget, TorchReader.remedy)


def _read_zip(archive: Archive, budget: Budget, size: int) -> Any:
    names = list(archive.entries)
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            "is a TorchScript program; a state dict is needed: in PyTorch, "
            "torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    found = [name for name in names if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError("is a zip archive, but neither of torch.save nor of numpy.savez")
    prefix = found[0].removesuffix("data.pkl")
    data = archive.stored(found[0])
    reader = TorchReader(Stream(io.BytesIO(data), len(data)), budget, size)
    content = reader.load()
    order = prefix + "byteorder"
    is_big_endian = order in archive.entries and archive.stored(order) == b"big"
    for key, storage in reader.storages.items():
        name = f"{prefix}data/{key}"
        if name not in archive.entries or archive.entries[name].file_size != storage.size:
            raise UserError(f"cut off or damaged: no entry {shown(name)} of {storage.size} bytes")
        storage.data = archive.stored(name)
        storage.is_big_endian = is_big_endian
    return content


def _read_legacy(file: BinaryIO, budget: Budget, size: int) -> Any:
    stream = Stream(file, size)

    def load() -> tuple[Any, TorchReader]:
        reader = TorchReader(stream, budget, size)
        return reader.load(), reader

    if [load()[0], load()[0]] != [MAGIC, PROTOCOL]:
        raise UserError("damaged: not what torch.save wrote before 1.6")
    load()  # byte order and sizes of types of the machine; the arrays are little-endian always
    content, reader = load()
    keys, _ = load()
    if not isinstance(keys, list) or set(map(shown, keys)) != set(reader.storages):
        raise UserError("damaged: the storages are not those that the tensors refer to")
    for key in keys:
        storage = reader.storages[shown(key)]
        (count,) = struct.unpack("<q", stream.read(8))
        if count * storage.itemsize != storage.size:
            raise UserError(f"damaged: storage {shown(key)} has another size than its tensors say")
        storage.data = stream.read(storage.size)
    return content


def write_torch(
    path: Path, arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as `torch.save` does; `torch.load(path, weights_only=True)` reads it.

    With `extra`, whose values are plain, the state dict is its entry "state_dict". Raise
    `UserError` for an array of a type that PyTorch lacks, or a value that is not plain.
    """
    storages: list[np.ndarray] = []
    content = dict(arrays) if extra is None else {"state_dict": dict(arrays), **extra}
    try:
        data = b"\x80\x02" + _pickled(content, storages) + b"."
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with atomic_replace(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write_entry(archive, "data.pkl", data)
        _write_entry(archive, "byteorder", b"little")
        for number, array in enumerate(storages):
            _write_entry(archive, f"data/{number}", _bytes(array))
        _write_entry(archive, "version", b"3\n")


def _write_entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(data)
    is_large = entry.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's rule: 20 bytes more
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(entry.filename) + 20 * is_large
    padding = -(start + 4) % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w") as file:
        file.write(data)


def _bytes(array: np.ndarray) -> memoryview:
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data


class _Opcodes(bytes):
    """A part of a pickle that is ready."""


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """Return the opcodes of `value`, protocol 2; put its arrays into `storages`."""
    if isinstance(value, _Opcodes):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int) and value.bit_length() < MAX_BITS:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + struct.pack("<B", len(data)) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, list | tuple):
        items = b"".join(_pickled(item, storages) for item in value)
        return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
    if isinstance(value, Mapping):
        pairs = b"".join(_pickled(part, storages) for item in value.items() for part in item)
        return b"}(" + pairs + b"u"
    if isinstance(value, np.ndarray):
        return _pickled_array(value, storages)
    raise UserError(f"cannot hold a {type(value).__name__}; only plain values and arrays")


def _pickled_array(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    name = array.dtype.name
    if name not in DTYPES:
        raise UserError(f"cannot hold an array of {name}; PyTorch has no such numbers")
    kinds = {dtype: f"ctorch\n{kind}\n" for kind, dtype in reversed(STORAGES.items())}
    kind = kinds.get(name, "ctorch.storage\nUntypedStorage\n")
    count = array.size if name in kinds else array.nbytes
    key = str(len(storages))
    storages.append(array)
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = _pickled(("storage", _Opcodes(kind.encode()), key, "cpu", count), []) + b"Q"
    hooks, dtype = _Opcodes(b"ccollections\nOrderedDict\n)R"), f"ctorch\n{name}\n".encode()
    arguments = (_Opcodes(storage), 0, array.shape, strides, False, hooks)
    if name in kinds:
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + _pickled(arguments, []) + b"R"
    more = (*arguments, _Opcodes(dtype))
    return b"ctorch._utils\n_rebuild_tensor_v3\n" + _pickled(more, []) + b"R"
