"""Files and folders appear whole or not at all, whenever the process dies."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import pytest

from utils import files
from utils.files import (
    atomic_folder,
    atomic_replace,
    atomic_write_bytes,
    atomic_write_text,
    recover_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text(text)


def fail(writing: AbstractContextManager[Path], error: Exception) -> NoReturn:
    """Write half of something, then let the error pass through the context manager."""
    with writing as temporary:
        target = temporary / "a" if temporary.is_dir() else temporary
        target.write_text("half")
        raise error


def test_write_creates_folders_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "fil é.txt"
    atomic_write_text(target, "grün\n")
    atomic_write_text(target, "blau\n")
    assert target.read_bytes() == b"blau\n"
    assert names(target.parent) == [target.name]
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~files._umask()


def test_the_temporary_file_keeps_the_suffix_and_the_old_content_until_the_end(tmp_path):
    target = tmp_path / "x.npy"
    target.write_bytes(b"old")
    with atomic_replace(target) as temporary:
        assert temporary.suffix == ".npy"
        assert temporary.parent == target.parent
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_a_failing_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "x"
    atomic_write_bytes(target, b"old")
    with pytest.raises(OSError, match="full"):
        fail(atomic_replace(target), OSError(errno.ENOSPC, "full"))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_folder_is_replaced_whole(tmp_path):
    run = tmp_path / "last"
    fill(run, "1")
    (run / "stray").write_text("of the first")
    fill(run, "2")
    assert names(run) == ["a"]
    assert (run / "a").read_text() == "2"
    assert names(tmp_path) == ["last"]


def test_a_failing_folder_leaves_the_old_one(tmp_path):
    run = tmp_path / "last"
    fill(run, "1")
    with pytest.raises(RuntimeError):
        fail(atomic_folder(run), RuntimeError())
    assert (run / "a").read_text() == "1"
    assert names(tmp_path) == ["last"]


def test_left_overs_of_a_killed_process_disappear_at_the_next_write(tmp_path):
    run = tmp_path / "last"
    fill(run, "1")
    (tmp_path / ".last-abc.part").mkdir()
    (tmp_path / ".last-abc.part/a").write_text("half")
    (tmp_path / ".best-abc.part").mkdir()  # of another folder
    fill(run, "2")
    assert names(tmp_path) == [".best-abc.part", "last"]


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_death_at_each_rename_leaves_a_whole_folder(tmp_path, monkeypatch, renames_done):
    """The process dies before the first, between the two, or right after the second rename."""
    run = tmp_path / "last"
    fill(run, "1")

    class Death(BaseException):
        pass

    rename = Path.rename
    done: list[Path] = []

    def dying(self, target):
        if len(done) == renames_done:
            raise Death
        done.append(target)
        return rename(self, target)

    def no_cleaning(path, ignore_errors=False):
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(shutil, "rmtree", no_cleaning)
        with pytest.raises(Death):
            fill(run, "2")
    recover_folder(run)
    assert (run / "a").read_text() == ("2" if renames_done == 2 else "1")
    assert not (tmp_path / "last.old").exists()
    fill(run, "3")
    assert names(tmp_path) == ["last"]
    assert (run / "a").read_text() == "3"


def test_everything_is_flushed_before_it_is_visible(tmp_path, monkeypatch):
    """The data must be on the disk before the rename is."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are read from /proc")
    events: list[str] = []

    def noting(name: str) -> Callable:
        original = getattr(Path, name)

        def call(self: Path, target: Path) -> Path:
            events.append(name)
            return original(self, target)

        return call

    def fsync(handle: int) -> None:
        events.append(Path(f"/proc/self/fd/{handle}").resolve().name)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, noting(name))
    atomic_write_bytes(tmp_path / "file", b"1")
    assert events[1] == "replace"
    assert events[0].startswith(".file-")
    assert events[2] == tmp_path.name
    events.clear()
    fill(tmp_path / "folder", "1")
    assert events == ["a", "rename", tmp_path.name]


KILLED = """
import sys
from pathlib import Path
from utils.files import atomic_write_bytes
target = Path(sys.argv[1])
count = 0
while True:
    count = (count + 1) % 250
    atomic_write_bytes(target, bytes([count]) * 200_000)
    print(count, flush=True)
"""


def test_a_killed_writer_leaves_one_of_its_files(tmp_path, repo):
    target = tmp_path / "x"
    for after in (1, 3, 8):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(target)], cwd=repo, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(after):
            child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()
        data = target.read_bytes()
        assert len(data) == 200_000
        assert len(set(data)) == 1


def test_recovery_without_anything_to_recover(tmp_path):
    recover_folder(tmp_path / "none")
    fill(tmp_path / "last", "1")
    recover_folder(tmp_path / "last")
    assert names(tmp_path) == ["last"]
