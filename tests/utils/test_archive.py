"""Foreign archives: whole ones arrive as they are, and nothing hostile leaves a file outside."""

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils import archive as module
from utils.archive import Limits, unpack
from utils.errors import UserError

Entry = tuple[str, bytes | None]  # name and content; None: a folder
TREE: list[Entry] = [
    ("./", None),
    ("top/", None),
    ("top/a.txt", b"one\n"),
    ("top/empty", b""),
    ("./top/sub/b.png", bytes(range(256)) * 5000),  # several blocks, no entry for its folder
    ("top/sub/", None),
    ("top/grün/名.txt", b"names"),
]


def tar(entries: Sequence[Entry], change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """Return a tar archive; `change` gets the header of the last entry."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as packed:
        for number, (name, content) in enumerate(entries, 1):
            info = tarfile.TarInfo(name)
            info.mode = 0o4777
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            if change and number == len(entries):
                change(info)
            packed.addfile(info, io.BytesIO(content or b""))
    return data.getvalue()


def zipped(
    entries: Sequence[Entry], change: Callable[[zipfile.ZipInfo], None] | None = None
) -> bytes:
    """Return a zip archive; `change` gets the header of the last entry."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for number, (name, content) in enumerate(entries, 1):
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, with a NUL
            info.compress_type = zipfile.ZIP_DEFLATED
            if change and number == len(entries):
                change(info)
            packed.writestr(info, content or b"")
    return data.getvalue()


FORMS: dict[str, Callable[[Sequence[Entry]], bytes]] = {
    "a.tar": tar,
    "a.tar.gz": lambda entries: gzip.compress(tar(entries)),
    "a.tar.bz2": lambda entries: bz2.compress(tar(entries)),
    "a.tar.xz": lambda entries: lzma.compress(tar(entries)),
    "a.zip": zipped,
}
BOTH = pytest.mark.parametrize("form", ["a.tar.xz", "a.zip"])


def run(folder: Path, data: bytes, name: str = "archive", **more: Any) -> Path:
    """Unpack below `folder`/in."""
    archive, target = folder / name, folder / "in" / "here"
    target.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(data)
    unpack(archive, target, **more)
    return target


def refused(folder: Path, data: bytes, **more: Any) -> str:
    """Return the line that an archive is refused with; nothing may lie outside the target."""
    with pytest.raises(UserError) as caught:
        run(folder, data, **more)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert message.startswith(f"{folder / 'archive'}: ")
    assert sorted(path.name for path in folder.iterdir()) == ["archive", "in"]
    assert [path.name for path in (folder / "in").iterdir()] == ["here"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    return message


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_an_archive_arrives(tmp_path: Path, form: str) -> None:
    """Whatever the file is called, and with the permissions of any new file."""
    target = run(tmp_path, FORMS[form](TREE), "download")
    wanted = {name.removeprefix("./"): data for name, data in TREE if data is not None}
    assert tree(target) == wanted
    (tmp_path / "plain").touch()
    for path in target.rglob("*"):
        expected = target if path.is_dir() else tmp_path / "plain"
        assert path.stat().st_mode == expected.stat().st_mode


@BOTH
def test_only_what_is_wanted_is_written(tmp_path: Path, form: str) -> None:
    data = FORMS[form](TREE)
    target = run(tmp_path, data, keep=lambda parts: parts[-1] != "b.png")
    assert sorted(tree(target)) == ["top/a.txt", "top/empty", "top/grün/名.txt"]
    with pytest.raises(UserError, match="absolute"):  # checked all the same
        run(tmp_path, FORMS[form]([("/a", b"")]), keep=lambda _: False)


NAMES = {
    "/absolute": "has an absolute name",
    "//double": "has an absolute name",
    "../outside": "leads out of the folder with '..'",
    "a/../../outside": "leads out of the folder with '..'",
    "a/..": "leads out of the folder with '..'",
    "C:/windows": "has a drive letter or colon",
    "file:stream": "has a drive letter or colon",
    "a\\b": "has a backslash",
    "..\\outside": "has a backslash",
    "new\nline": "has a control character",
    "escape\x1b[2J": "has a control character",
    "c1\x9b": "has a control character",
    "dot.": "ends in a dot or space",
    "a /b": "ends in a dot or space",
    "aux": "has the name of a device",
    "a/COM1.png": "has the name of a device",
    "n" * 256: "more than 1024 bytes, or 255 between slashes",
    "ü" * 128: "more than 1024 bytes, or 255 between slashes",
    "long/" * 210 + "x": "more than 1024 bytes, or 255 between slashes",
}


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_hostile_names(tmp_path: Path, form: str, name: str) -> None:
    message = refused(tmp_path, FORMS[form]([("good", b"x"), (name, b"evil")]))
    assert NAMES[name] in message
    assert f"member {name[:80]!r}"[:60] in message
    assert "nothing was unpacked" in message


@pytest.mark.parametrize("name", ["/absolute/", "a/../../b/", "C:/", "a\\b/"])
@BOTH
def test_hostile_folders(tmp_path: Path, form: str, name: str) -> None:
    refused(tmp_path, FORMS[form]([(name, None)]))


def test_a_nul_does_not_hide_the_rest_of_a_name(tmp_path: Path) -> None:
    assert "control character" in refused(tmp_path, zipped([("good.png\0/../../x", b"evil")]))

    def pax(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"path": "good.png\0/../../x"}

    assert "control character" in refused(tmp_path, tar([("x", b"evil")], pax))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    data = tar([("na_me", b"")])
    bad = bytearray(data)
    bad[2] = 0xFF
    bad[148:156] = b"%06o\0 " % (sum(bad[:148]) + 8 * 32 + sum(bad[156:512]))
    assert "wrong UTF-8" in refused(tmp_path, bytes(bad))


@BOTH
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_collide(tmp_path: Path, form: str) -> None:
    for first, second in [
        ("a", "a"),
        ("a/b", "A/c"),
        ("a.png", "A.PNG"),
        ("straße", "STRASSE"),
        ("é", "e\u0301"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("./a", "a"),
        ("a//b", "a/b"),
    ]:
        message = refused(tmp_path, FORMS[form]([(first, b"1"), (second, b"2")]))
        assert f"member {second!r} is there already, as" in message
        clear(tmp_path)
    assert "there already" in refused(tmp_path, FORMS[form]([("a", b"1"), ("a/", None)]))


def clear(folder: Path) -> None:
    for path in sorted((folder / "in").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


SPECIAL = {
    "symbolic link": (tarfile.SYMTYPE, stat.S_IFLNK),
    "hard link": (tarfile.LNKTYPE, None),
    "character device": (tarfile.CHRTYPE, stat.S_IFCHR),
    "block device": (tarfile.BLKTYPE, stat.S_IFBLK),
    "pipe": (tarfile.FIFOTYPE, stat.S_IFIFO),
    "socket": (None, stat.S_IFSOCK),
    "sparse": (tarfile.GNUTYPE_SPARSE, None),
    "contiguous": (tarfile.CONTTYPE, None),
    "unknown": (b"Z", 0o110000),
}


@pytest.mark.parametrize("kind", [k for k in SPECIAL if SPECIAL[k][0]])
def test_links_and_devices_in_tar(tmp_path: Path, kind: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = SPECIAL[kind][0] or b"", "/etc/passwd"

    message = refused(tmp_path, tar([("good", b""), ("evil", b"")], change))
    assert "member 'evil' is a link, a device or another special file" in message


@pytest.mark.parametrize("kind", [k for k in SPECIAL if SPECIAL[k][1]])
def test_links_and_devices_in_zip(tmp_path: Path, kind: str) -> None:
    def change(info: zipfile.ZipInfo) -> None:
        info.create_system, info.external_attr = 3, ((SPECIAL[kind][1] or 0) | 0o777) << 16

    message = refused(tmp_path, zipped([("good", b""), ("evil", b"/etc/passwd")], change))
    assert "member 'evil' is a link, a device or another special file" in message


def test_a_zip_that_calls_a_file_a_folder(tmp_path: Path) -> None:
    for name, kind, attributes in [
        ("x", stat.S_IFDIR, 0), ("x/", stat.S_IFREG, 0), ("x", 0, 0x400),
    ]:  # fmt: skip

        def change(info: zipfile.ZipInfo, attr: int = kind << 16 | attributes) -> None:
            info.external_attr = attr

        assert "special file" in refused(tmp_path, zipped([(name, b"")], change))


def test_a_link_and_a_file_behind_it(tmp_path: Path) -> None:
    """The classic: a link to the outside, then a file whose path leads through it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as packed:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../.."
        packed.addfile(link)
        file = tarfile.TarInfo("link/evil")
        file.size = 4
        packed.addfile(file, io.BytesIO(b"evil"))
    refused(tmp_path, data.getvalue())


def test_sparse_files_of_pax(tmp_path: Path) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}

    assert "special file" in refused(tmp_path, tar([("evil", b"x")], change))


@BOTH
def test_limits_of_members_and_sizes(tmp_path: Path, form: str) -> None:
    data = FORMS[form]([("a", bytes(1000)), ("b", bytes(1001))])
    run(tmp_path / "fits", data, limits=Limits(members=2, member=1001, total=2001))
    for number, (limits, said) in enumerate([
        (Limits(members=1), "more than the 1 members allowed"),
        (Limits(member=1000), "member 'b' has 1001 bytes; allowed: 1000"),
        (Limits(total=2000), "unpacks to more than the 2000 bytes allowed"),
    ]):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        assert said in refused(tmp_path / str(number), data, limits=limits)


@BOTH
def test_bombs(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive that unpacks to a lot: allowed is a multiple of its own size."""
    monkeypatch.setattr(module, "_ALWAYS", 1000)
    data = FORMS[form]([("a", bytes(20_000_000))])
    assert len(data) < 50_000
    assert "bytes allowed" in refused(tmp_path, data)
    assert not tree(tmp_path / "in")


def test_bombs_that_lie(tmp_path: Path) -> None:
    """The declared size is small, the data is not: no more than declared is ever written."""
    data = zipped([("a", bytes(50_000_000))])
    lie = data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 10))
    assert "damaged" in refused(tmp_path, lie)
    assert sum(map(len, tree(tmp_path / "in").values())) <= 10


def test_a_bomb_of_headers(tmp_path: Path) -> None:
    """A name that takes gigabytes must not get into memory."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)
    bomb = gzip.compress(header + bytes(1 << 22))
    assert "bytes before its data" in refused(tmp_path, bomb)
    info.type = tarfile.XHDTYPE
    assert "bytes before its data" in refused(tmp_path, info.tobuf(tarfile.GNU_FORMAT))


def test_headers_without_end(tmp_path: Path) -> None:
    """Headers that announce headers: neither deep recursion nor a long time."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    chain = (info.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * 5000
    refused(tmp_path, chain)


def test_a_size_below_zero(tmp_path: Path) -> None:
    """It would lead back to the same header for ever."""
    info = tarfile.TarInfo("a")
    good = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    good[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    good[148:156] = b"%06o\0 " % (sum(good[:148]) + 8 * 32 + sum(good[156:512]))
    refused(tmp_path, bytes(good) * 3 + bytes(1024))


def test_xz_that_wants_too_much_memory(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29, "mode": lzma.MODE_FAST,
                "mf": lzma.MF_HC3, "nice_len": 3}]  # fmt: skip
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    data = compressor.compress(tar([("a", b"")])) + compressor.flush()
    assert "Memory usage limit" in refused(tmp_path, data)


def test_xz_of_several_streams_with_padding(tmp_path: Path) -> None:
    data = tar(TREE)
    parts = [lzma.compress(data[:1000]), bytes(8), lzma.compress(data[1000:]), bytes(70_000)]
    assert len(tree(run(tmp_path, b"".join(parts)))) == 4
    clear(tmp_path)
    assert "damaged" in refused(tmp_path, b"".join([*parts, b"rest"]))


def test_a_table_of_contents_that_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DIRECTORY", 1000)
    entries: list[Entry] = [(f"file{number}", b"") for number in range(100)]
    assert "table of contents of more than 1000 bytes" in refused(tmp_path, zipped(entries))


def test_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(zipped([("a", b"secret")]))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    assert "member 'a' is encrypted" in refused(tmp_path, bytes(data))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9])
def test_other_ways_to_pack_in_zip(tmp_path: Path, method: int) -> None:
    data = bytearray(zipped([("a", b"x")]))
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.index(signature) + offset
        data[place : place + 2] = struct.pack("<H", method)
    assert "packed in another way than by deflate" in refused(tmp_path, bytes(data))


@pytest.mark.parametrize("form", FORMS)
def test_archives_cut_short(tmp_path: Path, form: str) -> None:
    """At any place: between members too, where tarfile alone would see nothing amiss."""
    entries: list[Entry] = [("a", os.urandom(3000)), ("b", os.urandom(3000))]
    data = FORMS[form](entries)
    if form == "a.tar":
        data = data[: 2 * (512 + 3072) + 512]  # no more zeros at its end than one block
    for end in [512 + 3072, 2 * (512 + 3072), *range(1, len(data) - 1, 997)]:
        if end < len(data) - 1:
            assert "damaged" in refused(tmp_path, data[:end])
            clear(tmp_path)


@pytest.mark.parametrize("form", ["a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.zip"])
def test_a_flipped_bit(tmp_path: Path, form: str) -> None:
    data = bytearray(FORMS[form]([("a", os.urandom(50_000))]))
    data[25_000] ^= 4
    assert "damaged" in refused(tmp_path, bytes(data))


def test_a_wrong_checksum_at_the_end(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tar(TREE)))
    data[-6] ^= 1
    assert "damaged" in refused(tmp_path, bytes(data))


def test_a_broken_header_between_members(tmp_path: Path) -> None:
    """`tarfile` takes it for the end of the archive."""
    data = bytearray(tar([("a", b"1"), ("b", b"2")]))
    data[1024 + 150] ^= 1
    assert "damaged" in refused(tmp_path, bytes(data))


@pytest.mark.parametrize("data", [
    b"", b"PK", b"PK\x03\x04", b"no archive at all" * 100, b"Rar!\x1a\x07\x01\x00", b"\x1f\x8b",
    b"7z\xbc\xaf\x27\x1c" + bytes(100), b"\xfd7zXZ\x00", gzip.compress(b"just text" * 100, mtime=0),
])  # fmt: skip
def test_other_files(tmp_path: Path, data: bytes) -> None:
    message = refused(tmp_path, data)
    assert "damaged, or no .tar, .tar.gz, .tar.bz2, .tar.xz or .zip (" in message
    assert message.endswith("; get it again or unpack it by hand")


def test_random_damage(tmp_path: Path) -> None:
    """Whatever a file holds, it ends well or with one line, and soon."""
    rng = np.random.default_rng(0)
    small: list[Entry] = [("top/", None), ("top/a", b"x" * 700), ("top/" + "n" * 120, b"y")]
    for make in (tar, zipped):
        good = make(small)
        for _ in range(150):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            with contextlib.suppress(UserError):
                run(tmp_path, bytes(data))
            clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "in"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    assert "no room left on the disk" in refused(tmp_path, tar(TREE))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.zip: No such file or directory"):
        unpack(tmp_path / "gone.zip", tmp_path)
    with pytest.raises(UserError, match="Is a directory"):
        unpack(tmp_path, tmp_path)
