"""PyTorch files made by hand, opcode by opcode, and how what is read of them is compared."""

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
SYSTEM = b"\x80\x02}X\x0d\0\0\0little_endian\x88s."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(
    count: int = 4, key: str = "0", kind: str = "torch\nFloatStorage", view: bytes = b""
) -> bytes:
    place = f"c{kind}\n".encode() + text(key) + text("cpu") + number(count)
    return b"(" + text("storage") + place + view + b"tQ"


def tensor(
    shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), offset: int = 0, **of: Any
) -> bytes:
    """Return the opcodes of a tensor; by default the four numbers of storage 0."""
    place = number(offset) + sizes(*shape) + sizes(*strides)
    return TENSOR + b"(" + storage(**of) + place + b"\x89" + HOOKS + b"tR"


def dict_of(**entries: bytes) -> bytes:
    items = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def zip_file(
    path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes
) -> Path:
    """Write a file as torch.save does since 1.6; `more` are entries beside the pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, data in ({"0": FOUR} if storages is None else storages).items():
            archive.writestr(f"a/data/{key}", data)
        for name, data in more.items():
            archive.writestr(f"a/{name}", data)
    return path


def legacy_file(
    path: Path, pickled: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None
) -> Path:
    """Write a file as torch.save did before 1.6; each storage is its count and its bytes."""
    parts = {"0": (4, FOUR)} if storages is None else storages
    keys = b"\x80\x02](" + b"".join(map(text, parts)) + b"e."
    data = io.BytesIO()
    data.write(MAGIC + SYSTEM + pickled.replace(b"tQ", b"NtQ") + keys)
    for count, content in parts.values():
        data.write(struct.pack("<q", count) + content)
    path.write_bytes(data.getvalue())
    return path


def assert_same(read: Any, wanted: Any) -> None:
    """Compare bit by bit, at any depth."""
    if isinstance(wanted, np.ndarray):
        assert isinstance(read, np.ndarray)
        assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
        assert read.tobytes() == wanted.tobytes()
    elif isinstance(wanted, dict):
        assert list(read) == list(wanted)
        for key, value in wanted.items():
            assert_same(read[key], value)
    elif isinstance(wanted, list | tuple):
        assert type(read) is type(wanted)
        for one, other in zip(read, wanted, strict=True):
            assert_same(one, other)
    else:
        assert type(read) is type(wanted)
        assert read == wanted or (read != read and wanted != wanted)
