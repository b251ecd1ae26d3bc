"""Arrays out of foreign files (`.npz`, `.safetensors`, bytes), checked before allocation."""

import contextlib
import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import UserError

MAX_DIRECTORY = 8 << 20  # bytes, of a zip archive: 90,000 entries
MAX_HEADER = 16 << 20  # bytes, of a safetensors file: 150,000 entries
MAX_ARRAY = 4 << 30  # bytes, in an archive, uncompressed
MAX_RATIO = 100  # of all arrays to the file; a matrix of a permutation reaches 400 by itself
SLACK = 64 << 20  # bytes that even a small file may unpack to
MAX_DIMENSIONS = 32

MAX_NPY_HEADER = 10_000  # bytes, as in numpy

# Not numpy's own parser: it evaluates what it finds as a Python literal.
NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*(?P<descr>.*?),\s*'fortran_order':\s*(?P<order>True|False),"
    r"\s*'shape':\s*\((?P<shape>[\d, ]*)\),?\s*\}\s*",
    re.DOTALL,
)
NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # a mark: numpy has no such numbers
SAFETENSORS_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"), "C64": np.dtype("<c8"),
}  # fmt: skip


def shown(text: object, limit: int = 80) -> str:
    """Return a name out of a file so that it fits into one line."""
    short = str(text)[: limit + 1]
    short = short if short.isprintable() else ascii(short)[1:-1]
    return short if len(short) <= limit else short[: limit - 1] + "…"


@contextlib.contextmanager
def one_line(path: Path, form: str) -> Iterator[None]:
    """Turn whatever a damaged or hostile file leads to into a `UserError` of one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file can break a parser in any way
        reason = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: not a whole {form} file ({reason}); copy it again") from None


def read_only_view(
    buffer: bytes | memoryview,
    dtype: np.dtype,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    offset: int = 0,
) -> np.ndarray:
    """Look at bytes as an array of numbers, without a copy where that is possible.

    `strides` count elements (default: row-major), `offset` bytes. bfloat16 becomes float32 of the
    same value, other byte orders the machine's, a bool is what is not 0: these are copies. Raise
    `UserError` if the array reaches over the end of the bytes.
    """
    check_shape(shape)
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if 0 in shape:
        array = np.zeros(shape, np.float32 if dtype.names else dtype.newbyteorder("="))
        array.flags.writeable = False
        return array
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(offset, *strides, 0) < 0 or offset + (reach + 1) * dtype.itemsize > len(buffer):
        raise UserError(
            f"damaged: an array of shape {list(shape)} reaches over its {len(buffer)} bytes"
        )
    steps = [stride * dtype.itemsize for stride in strides]
    array = np.ndarray(tuple(shape), dtype, buffer, offset, steps)
    if dtype.names:  # a bfloat16 is the upper half of a float32
        half = array[dtype.names[0]]
        array = np.asarray(half.astype(np.uint32) << 16).view(np.float32)
    elif dtype.kind == "b":
        array = np.asarray(array.view(np.uint8) != 0)
    elif not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def check_shape(shape: Sequence[int]) -> None:
    """Raise `UserError` unless `shape` is a short row of sizes."""
    if (
        not isinstance(shape, tuple | list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    ):
        raise UserError("damaged: an array without a proper shape")


class _File(io.BufferedReader):
    """A file whose table of contents zipfile cannot read in one go if it is too long."""

    is_listed = False

    def read(self, size: int | None = -1) -> bytes:
        if not self.is_listed and size is not None and size > MAX_DIRECTORY:
            raise UserError("refused: the table of contents of the archive is too long")
        return super().read(size)


@dataclass(frozen=True)
class Archive:
    """An open zip archive: its entries by name."""

    zip: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]
    file: BinaryIO

    def stored(self, name: str) -> bytes:
        """Read an uncompressed entry, up to its declared size; check its sum if it has one.

        PyTorch writes a sum of 0 after `torch.serialization.set_crc32_options(False)`.
        """
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UserError(f"refused: entry {shown(name)} is compressed, which PyTorch never does")
        self.file.seek(entry.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self.file.read(30))
        start = self.file.seek(name_length + extra_length, io.SEEK_CUR)
        left = self.file.seek(0, io.SEEK_END) - start
        if signature != b"PK\3\4" or entry.file_size > left:
            raise UserError(f"cut off or damaged: entry {shown(name)} is not where it should be")
        self.file.seek(start)
        data = self.file.read(entry.file_size)
        if entry.CRC and zlib.crc32(data) != entry.CRC:
            raise UserError(f"damaged: entry {shown(name)} has a wrong check sum; copy it again")
        return data


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[Archive]:
    """Open a zip archive; `UserError` if two entries have one name or one is encrypted."""
    with path.open("rb") as file, _File(io.FileIO(path)) as listed, zipfile.ZipFile(listed) as zip_:
        listed.is_listed = True
        entries: dict[str, zipfile.ZipInfo] = {}
        for entry in zip_.infolist():
            if entry.filename in entries or entry.flag_bits & 1:
                raise UserError(f"refused: entry {shown(entry.filename)} twice or encrypted")
            entries[entry.filename] = entry
        yield Archive(zip_, entries, file)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of numbers in a file of `numpy.savez` or `savez_compressed`.

    A declared size over 4 GiB for one array, or over 100 times the file and 64 MiB for all, is
    refused before anything is unpacked.
    """
    with one_line(path, ".npz"), open_zip(path) as archive:
        limit = MAX_RATIO * path.stat().st_size + SLACK
        if sum(entry.file_size for entry in archive.entries.values()) > limit:
            raise UserError(f"refused: it would unpack to over {MAX_RATIO} times its size")
        if strays := [name for name in archive.entries if not name.endswith(".npy")]:
            raise UserError(f"refused: entry {shown(strays[0])} is no array")
        return {
            name.removesuffix(".npy"): _read_npy(archive.zip, entry)
            for name, entry in archive.entries.items()
        }


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    name = shown(entry.filename)
    with archive.open(entry) as file:
        magic, major = struct.unpack("<6sBx", file.read(8))
        (length,) = (
            struct.unpack("<H", file.read(2)) if major == 1 else struct.unpack("<I", file.read(4))
        )
        header = NPY_HEADER.fullmatch(file.read(min(length, MAX_NPY_HEADER)).decode("latin1"))
        if magic != b"\x93NUMPY" or not header:
            raise UserError(f"damaged: entry {name} is not what numpy writes")
        code = header["descr"].strip("'")
        if not NUMBERS.fullmatch(code):
            raise UserError(f"refused: {name} holds {shown(code)}; only numbers are read")
        dtype = np.dtype(code)
        shape = tuple(int(size) for size in header["shape"].split(",") if size.strip())
        check_shape(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > min(MAX_ARRAY, entry.file_size):
            raise UserError(f"cut off or refused: {name} announces {nbytes} bytes")
        data = file.read(nbytes)
        if len(data) < nbytes or file.read(1):
            raise UserError(f"damaged: {name} has another size than it announces")
    if header["order"] == "True":
        return read_only_view(data, dtype, shape[::-1]).T
    return read_only_view(data, dtype, shape)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a `.safetensors` file; the arrays must fill it without gaps, as the format demands."""
    with one_line(path, ".safetensors"), path.open("rb") as file:
        size = path.stat().st_size - 8
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, MAX_HEADER):
            raise UserError(
                f"cut off or refused: a header of {length} bytes; {size} are there, "
                f"{MAX_HEADER} allowed"
            )
        header = json.loads(file.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        _check_cover(header, size - length)
        return {name: _read_tensor(file, name, entry) for name, entry in _by_offset(header)}


def _by_offset(header: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(header.items(), key=lambda item: item[1]["data_offsets"])


def _check_cover(header: dict[str, Any], size: int) -> None:
    """Nothing is read twice, and nothing beyond the end."""
    position = 0
    for name, entry in _by_offset(header):
        begin, end = entry["data_offsets"]
        if begin != position or end < begin or end > size:
            raise UserError(
                f"cut off or damaged: entry {shown(name)} should be bytes {shown(begin)} to "
                f"{shown(end)} of {size}"
            )
        position = end
    if position != size:
        raise UserError(f"damaged: {size - position} bytes belong to no entry")


def _read_tensor(file: io.BufferedReader, name: str, entry: dict[str, Any]) -> np.ndarray:
    dtype = SAFETENSORS_TYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(f"refused: entry {shown(name)} is of type {shown(entry['dtype'])}")
    shape = entry["shape"]
    check_shape(shape)
    begin, end = entry["data_offsets"]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise UserError(f"damaged: entry {shown(name)} has another size than its shape says")
    return read_only_view(file.read(end - begin), dtype, shape)
