"""Feed mutated files to one reader and report what happened; run by test_reader_fuzz.py.

Usage: python -m tests.utils.fuzz_readers READER CASES SEED, in an empty folder.
"""

import codecs
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.utils import torch_cases as made
from utils.errors import UserError
from utils.weight_file import read_weight_file

CASE, VICTIM = Path("case"), Path("victim")
GIB = 1 << 30
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "exec", "compile", "import",
    "pickle.find_class", "urllib.", "webbrowser.", "tempfile.",
)  # fmt: skip
ALLOWED = ("os.listdir", "os.scandir")
TOUCH = f"touch {VICTIM}"
ATTACKS = (
    made.call("os", "system", made.text(TOUCH)),
    made.call("posix", "system", made.text(TOUCH)),
    made.call("builtins", "eval", made.text(f"open('{VICTIM}', 'w')")),
    made.call("torch", "load", made.text(str(VICTIM))),
    made.call("functools", "partial", b"cos\nsystem\n", made.text(TOUCH)),
    b"(" + made.text(TOUCH) + b"ios\nsystem\n",
    made.call("torch.storage", "_load_from_bytes", b"C\5" + b"cos\n."),
    b"cnumpy\ndtype\n(N}" + made.text("set_state") + b"K\1stb",
)
PIECES = (
    *ATTACKS, b"0", b"2", b"(", b"1", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"\x92",
    b"b", b"a", b"e", b"s", b"u", b"d", b"l", b"]", b"}", b"\x8f", b"\x90", b"\x91", b"Q", b"N",
    b"q\0", b"h\0", b"h\1", b"h\5", b"\x94", b"\x97", b"\x98", b"\x82\1", b"C\1x", b"K\xff", b".",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8d" + b"\xff" * 8, b"\x96" + b"\xff" * 8, b"Px\n",
    b"\x95" + b"\xff" * 8, b"r\xff\xff\xff\xff", b"L1" + b"0" * 50 + b"L\n", made.text("w"),
)  # fmt: skip


def pickled(rng: random.Random, data: bytes) -> bytes:
    """Change the instructions of a pickle: leave out, repeat, insert, exchange, set arguments."""
    try:
        places = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    except Exception:  # changed before
        return damaged(rng, data)
    parts = [data[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(parts))
        change = rng.randrange(5)
        if change == 0:
            parts[at] = b""
        elif change == 1:
            parts[at] *= rng.choice((2, 3, 500))
        elif change == 2:
            parts.insert(at, rng.choice(PIECES))
        elif change == 3:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif len(parts[at]) > 1:
            size = len(parts[at]) - 1
            value = rng.choice(EXTREMES) % (1 << 8 * min(size, 8))
            parts[at] = parts[at][:1] + value.to_bytes(size, "little")
    return b"".join(parts)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, move, or overwrite bytes with extreme numbers."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not changed:
            return rng.randbytes(40)
        at, length = rng.randrange(len(changed)), rng.randrange(1, 30)
        change = rng.randrange(6)
        if change == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            changed[at] = rng.randrange(256)
        elif change == 2 and rng.random() < 0.3:
            del changed[at:]
        elif change == 3:
            changed[at:at] = rng.randbytes(length)
        elif change == 4:
            source = rng.randrange(len(changed))
            changed[at : at + length] = changed[source : source + length]
        else:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(EXTREMES) % (1 << 8 * size)
            changed[at : at + size] = value.to_bytes(size, "little")
    return bytes(changed)


def zipped(rng: random.Random, data: bytes, change: Callable[[Any, bytes], bytes]) -> bytes:
    """Change one entry and repair the sums, repeat an entry, or lie in the table of contents."""
    kind = rng.randrange(8)
    if kind == 0:
        return damaged(rng, data)
    if kind == 1:
        changed = bytearray(data)
        places = [p for p in range(len(data) - 3) if data[p : p + 4] in (b"PK\1\2", b"PK\5\6")]
        at = rng.choice(places) + rng.choice((8, 10, 16, 20, 24, 28, 30, 42, 4, 12))
        size = rng.choice((2, 4))
        changed[at : at + size] = (rng.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, "little")
        return bytes(changed)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        entries = old.infolist()
        main = [e for e in entries if e.filename.endswith((".pkl", ".npy"))]
        chosen = rng.choice(main if rng.random() < 0.8 else entries)
        for entry in entries:
            content = old.read(entry)
            content = change(rng, content) if entry is chosen else content
            how = zipfile.ZIP_DEFLATED if kind == 2 and rng.random() < 0.1 else entry.compress_type
            if not (kind == 3 and entry is chosen and rng.random() < 0.1):
                new.writestr(zipfile.ZipInfo(entry.filename), content, how)
    return target.getvalue()


def npy(rng: random.Random, data: bytes) -> bytes:
    """Change the words and numbers in the header of an array."""
    length = struct.unpack("<H", data[8:10])[0]
    header = data[10 : 10 + length]
    words = [b"1", b"99999999999", b"-1", b"'|O'", b"'<f8'", b"'<U3'", b"True", b"(", b"'V9'", b""]
    for old in rng.sample([b"2", b"3", b"4", b"'<f4'", b"False", b",", b"f", b")", b"descr"], 2):
        header = header.replace(old, rng.choice(words), 1)
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the words and numbers in the header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    words = [str(value).encode() for value in (*EXTREMES, -1, 1.5)]
    words += [b'"BF16"', b'"F64"', b"[", b"]", b"{", b"null", b"[]", b"9" * 500, b'"w"', b"1e999"]
    if rng.random() < 0.05:
        return data[: 8 + length] + rng.randbytes(len(data) - 8 - length)
    for old in rng.sample([b"0", b"8", b"24", b"[2", b'"F32"', b'"BOOL"', b":", b",", b"}"], 2):
        header = header.replace(old, rng.choice(words), 1)
    size = len(header) if rng.random() < 0.9 else rng.choice(EXTREMES)
    return struct.pack("<Q", size) + header + data[8 + length :]


def seeds(reader: str) -> list[bytes]:
    """Return sound files and hostile ones, as bytes."""
    golden = Path(__file__).resolve().parent.parent / "golden/torch_files"
    values = np.arange(6, dtype="f4").reshape(2, 3)
    state = {"w": values, "m": np.array([True, False]), "n": np.float64(2), "e": np.zeros((0, 2))}
    hostile = [made.dict_of(w=made.tensor(), x=attack) for attack in ATTACKS]
    if reader == "torch":
        stored = [golden / name for name in ("views.pt", "dtypes.pt", "lightning.ckpt")]
        files = [file.read_bytes() for file in stored]
        return files + [made.zip_file(CASE, attack).read_bytes() for attack in hostile]
    if reader == "legacy":
        stored = [golden / f"{name}_legacy.pt" for name in ("views", "dtypes")]
        files = [file.read_bytes() for file in stored]
        return files + [made.legacy_file(CASE, attack).read_bytes() for attack in hostile]
    if reader == "pdparams":
        files = [pickle.dumps({"a": state, "b": [state, (1, None)]}, n) for n in (2, 3, 4, 5)]
        return files + hostile
    if reader == "npz":
        for save in (np.savez, np.savez_compressed):
            save(CASE.with_suffix(".npz"), **state)
            hostile.append(CASE.with_suffix(".npz").read_bytes())
        CASE.with_suffix(".npz").unlink()
        return hostile[-2:]
    header = {
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "m": {"dtype": "BOOL", "shape": [2], "data_offsets": [24, 26]},
        "h": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [26, 30]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(range(30))]


def mutate(reader: str, rng: random.Random, data: bytes) -> bytes:
    if reader in ("torch", "npz"):
        return zipped(rng, data, pickled if reader == "torch" else npy)
    if rng.random() < 0.3:
        return damaged(rng, data)
    if reader == "safetensors":
        return safetensors(rng, data)
    if reader == "pdparams":
        return pickled(rng, data)
    # The third of the heads is followed by the pickle itself.
    ends = [n for n in range(len(data)) if data[n : n + 1] == b"."][:12]
    start = next(e + 1 for e in ends if data[e + 1 : e + 2] == b"\x80" and e > 20)
    end = start + len(data[start:].partition(b".\x80")[0]) + 1
    return data[:start] + pickled(rng, data[start:end]) + data[end:]


def use(content: Any) -> int:
    """Touch every array as a user would; return the number of bytes."""
    if isinstance(content, np.ndarray):
        assert not content.flags.writeable
        return len(content.tobytes())
    if isinstance(content, dict):
        return sum(map(use, content.values()))
    if isinstance(content, list | tuple | set | frozenset):
        return sum(map(use, content))
    assert content is None or isinstance(content, bool | int | float | complex | str | bytes)
    return 0


def status(name: str) -> int:
    """Return kilobytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(reader: str, cases: int, seed: int) -> None:
    rng, files = random.Random(seed), seeds(reader)
    broken: list[str] = []
    is_reading = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not is_reading:
            return
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            broken.append(f"{event} {arguments}")
        elif event.startswith(FORBIDDEN) and event not in ALLOWED:
            broken.append(f"{event} {str(arguments)[:200]}")

    CASE.write_bytes(files[0])
    use(read_weight_file(CASE).content)  # whatever is imported late is imported now
    codecs.lookup("raw-unicode-escape")  # Python's own, for texts of the first protocol
    sys.addaudithook(watch)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") * 1024 + 2 * GIB,) * 2)
    accepted = refused = 0
    for _ in range(cases):
        data = mutate(reader, rng, rng.choice(files))
        CASE.write_bytes(data)
        is_reading = True
        try:
            use(read_weight_file(CASE).content)
            accepted += 1
        except UserError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 700 or "MemoryError" in str(error):
                broken.append(str(error))
        finally:
            is_reading = False
    CASE.unlink()
    peak = status("VmHWM") - before
    report = {"accepted": accepted, "refused": refused, "kilobytes": peak, "broken": broken[:5]}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
