"""Unpacking foreign archives safely: regular files and folders only, none outside the target."""

import bz2
import errno
import gzip
import io
import lzma
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from utils.errors import UserError

Parts = tuple[str, ...]  # of a member's name, without "."
KINDS = ".tar, .tar.gz, .tar.bz2, .tar.xz or .zip"
_BLOCK = 1 << 20
_HEADER = 1 << 18  # bytes before the data of a tar member: long names, attributes
_DIRECTORY = 1 << 25  # bytes of a zip file's table of contents
_XZ_MEMORY = 1 << 28  # bytes; the strongest preset of xz needs 65 MiB
_ALWAYS = 1 << 30  # bytes that any archive may unpack to
_ALLOWANCE = 1 << 28  # bytes of a tar archive besides its files: headers, padding
_ENCRYPTED, _REPARSE_POINT = 0x41, 0x400  # flags of zip members; the latter is a link of Windows
_LONGEST = 1024  # bytes of a name
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates: not UTF-8
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the latter: without members


class BadArchive(UserError):
    """Say that a file is damaged, hostile or no archive."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold. Images hardly shrink: one that grows `ratio` times is a bomb."""

    members: int = 100_000
    member: int = 1 << 29  # bytes of one file
    total: int = 200 * 10**9  # bytes of all files
    ratio: int = 20

    def bytes_of(self, archive: Path) -> int:
        """Return the bytes that all files of this archive may have."""
        return min(self.total, max(_ALWAYS, self.ratio * archive.stat().st_size))


@dataclass(frozen=True)
class _Member:
    name: str  # as written in the archive
    size: int  # as declared
    folder: bool
    position: int  # in the archive's file
    blocks: Callable[[], Iterator[bytes]]


def unpack(
    archive: Path,
    folder: Path,
    keep: Callable[[Parts], bool] = bool,
    limits: Limits = Limits(),
) -> None:
    """Write the members that `keep` wants into the empty, temporary `folder`.

    The others are checked all the same. Raise BadArchive that names the first member against the
    rules, or for a damaged file, and UserError for a full disk; the folder then holds a part.
    """
    with _one_line(archive), archive.open("rb") as file:
        most, total, names = limits.bytes_of(archive), 0, _Names()
        size = archive.stat().st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=archive.name, disable=None) as bar:
            for number, member in enumerate(_members(archive, file, most), 1):
                bar.update(max(0, member.position - bar.n))
                total += member.size
                if number > limits.members:
                    raise UserError(f"more than the {limits.members} members allowed")
                if not 0 <= member.size <= limits.member:
                    raise _refusal(
                        member.name, f"has {member.size} bytes; allowed: {limits.member}"
                    )
                if total > most:
                    raise UserError(f"unpacks to more than the {most} bytes allowed")
                parts = _parts(member.name)
                if not parts and not member.folder:
                    raise _refusal(member.name, "has no name")
                names.add(parts, member)
                if parts and keep(parts):
                    _write(member, folder.joinpath(*parts))
            bar.update(size - bar.n)


def _write(member: _Member, target: Path) -> None:
    """Write a member with the permissions of any new file."""
    if member.folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with target.open("xb") as file:
        for block in member.blocks():
            written += len(block)
            if written > member.size:
                break
            file.write(block)
    if written != member.size:
        raise _refusal(member.name, f"does not have the {member.size} bytes that it declares")


def _parts(name: str) -> Parts:
    """Split a member's name; raise UserError if it leads elsewhere or is not allowed."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    rules = {
        "has a control character or wrong UTF-8 in its name": bool(_CONTROL.search(name)),
        "has a backslash in its name": "\\" in name,
        "has a drive letter or colon in its name": ":" in name,
        "has an absolute name": name.startswith("/"),
        "leads out of the folder with '..'": ".." in parts,
        "has a name that ends in a dot or space": any(p[-1] in ". " for p in parts),
        "has the name of a device": any(_DEVICE.fullmatch(p) for p in parts),
    }
    for rule, broken in rules.items():
        if broken:
            raise _refusal(name, rule)
    if len(name.encode()) > _LONGEST or any(len(p.encode()) > 255 for p in parts):
        raise _refusal(name, f"has a name of more than {_LONGEST} bytes, or 255 between slashes")
    return parts


def _refusal(name: str, rule: str) -> UserError:
    shown = repr(name if len(name) <= 80 else name[:80] + "…")
    return UserError(f"member {shown} {rule}: refused, nothing was unpacked")


@dataclass
class _Names:
    """The names so far; two that some file system takes for one are refused."""

    seen: dict[Parts, tuple[Parts, bool]] = field(default_factory=dict)  # spelling, is a folder

    def add(self, parts: Parts, member: _Member) -> None:
        for end in range(1, len(parts) + 1):
            entry = (parts[:end], end < len(parts) or member.folder)
            key = tuple(unicodedata.normalize("NFC", p).casefold() for p in entry[0])
            known = self.seen.setdefault(key, entry)
            if known is not entry and not (known == entry and entry[1]):
                raise _refusal(member.name, f"is there already, as {'/'.join(known[0])!r}")


def _members(path: Path, file: BinaryIO, most: int) -> Iterator[_Member]:
    start = file.read(6)
    file.seek(0)
    if start.startswith(_ZIP):
        return _zip_members(path)
    if start.startswith(b"\x1f\x8b"):
        return _tar_members(gzip.GzipFile(fileobj=file), file, most)
    if start.startswith(b"BZh"):
        return _tar_members(bz2.BZ2File(file), file, most)
    if start == b"\xfd7zXZ\x00":
        return _tar_members(io.BufferedReader(_Xz(file), _BLOCK), file, most)
    return _tar_members(file, file, most)


class _Xz(io.RawIOBase):
    """Decompress .xz in bounded memory, which `lzma.LZMAFile` does not."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed = b""
        self._decoder = self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if not self._packed and (self._decoder.eof or self._decoder.needs_input):
                self._packed = self._file.read(1 << 16)
                if not self._packed and not self._decoder.eof:
                    raise EOFError("it ends too early")
                if not self._packed:
                    return 0
            if self._decoder.eof:  # padding, or one more stream
                self._packed = self._packed.lstrip(b"\0")
                if not self._packed:
                    continue
                self._decoder = self._new()
            data = self._decoder.decompress(self._packed, len(buffer))
            self._packed = self._decoder.unused_data
        buffer[: len(data)] = data
        return len(data)


class _Stream:
    """Read on and on, never back, and no more than allowed: what `tarfile` reads headers from."""

    def __init__(self, source: Any, most: int) -> None:
        self._source = source
        self._most = most + _ALLOWANCE
        self._position = 0
        self.header = 0  # bytes read for the member that comes next
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self.header += size
        if size < 0 or self.header > _HEADER:
            raise UserError(f"a member with more than {_HEADER} bytes before its data")
        self.last = self.take(size)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise EOFError("a member that leads back")
        while self._position < position:
            if not self.take(min(_BLOCK, position - self._position)):
                raise EOFError("it ends too early")

    def take(self, size: int) -> bytes:
        data: bytes = self._source.read(size)
        self._position += len(data)
        if self._position > self._most:
            raise UserError(f"unpacks to more than {self._most} bytes")
        return data

    def blocks(self, size: int) -> Iterator[bytes]:
        while size:
            block = self.take(min(size, _BLOCK))
            if not block:
                raise EOFError("it ends too early")
            size -= len(block)
            yield block


def _tar_members(source: Any, file: BinaryIO, most: int) -> Iterator[_Member]:
    stream = _Stream(source, most)
    tar = tarfile.TarFile(fileobj=stream, encoding="utf-8")  # type: ignore[arg-type]
    while info := tar.next():
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or info.sparse:
            raise _refusal(info.name, "is a link, a device or another special file")
        blocks = partial(stream.blocks, info.size)
        yield _Member(info.name, info.size, info.isdir(), file.tell(), blocks)
        stream.header = 0
    if stream.last != bytes(tarfile.BLOCKSIZE):
        raise EOFError("it ends too early")
    while stream.take(_BLOCK):  # the checksums come last
        pass


class _ZipSource(io.FileIO):
    """A zip file whose table of contents is not read if it would fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY:
            raise UserError(f"a table of contents of more than {_DIRECTORY} bytes")
        return super().read(-1 if size is None else size)


def _zip_members(path: Path) -> Iterator[_Member]:
    with _ZipSource(path) as source, zipfile.ZipFile(source) as packed:
        for info in packed.infolist():
            name = info.orig_filename  # not cut at a NUL
            kind, folder = stat.S_IFMT(info.external_attr >> 16), name.endswith("/")
            if info.flag_bits & _ENCRYPTED:
                raise _refusal(name, "is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refusal(name, "is packed in another way than by deflate")  # unbounded memory
            plain = kind in (0, stat.S_IFDIR if folder else stat.S_IFREG)
            if not plain or info.external_attr & _REPARSE_POINT:
                raise _refusal(name, "is a link, a device or another special file")
            blocks = partial(_zip_blocks, packed, info)
            yield _Member(name, info.file_size, folder, info.header_offset, blocks)


def _zip_blocks(packed: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    with packed.open(info) as data:
        while block := data.read(_BLOCK):
            yield block


@contextmanager
def _one_line(archive: Path) -> Iterator[None]:
    """Turn whatever happens to a foreign file into one line that begins with its name."""
    try:
        yield
    except UserError as error:
        raise BadArchive(f"{archive}: {error}") from None
    except Exception as error:  # a damaged file can break the readers in any way
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{archive}: no room left on the disk to unpack it") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{error.filename or archive}: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadArchive(
            f"{archive}: damaged, or no {KINDS} ({reason}); get it again or unpack it by hand"
        ) from None
