"""A file on its way: what has arrived of it, of which version it is, and who is fetching it."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.files import atomic_write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ATTEMPTS = 20  # each but the last finds that another process has just finished


@dataclass
class Part:
    """What has arrived of a file, beside a note of which version of it that is."""

    path: Path
    url: str
    most: int  # bytes that the file may have
    verified: bool  # its hash is known
    version: str = ""  # ETag or Last-Modified
    size: int | None = None  # of the whole file
    ours: bool = False  # the content comes from `url`
    arriving: bool = False  # this process has received some of it

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def load(self) -> None:
        """Recall what an earlier call noted."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            url, version, size = note["url"], note["version"], note["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if url == self.url and isinstance(version, str) and isinstance(size, int | None):
            self.version, self.size, self.ours = version, size, True

    def have(self) -> int:
        """Return how many bytes need not come again."""
        if not (self.ours and (self.version or self.verified) and self.path.exists()):
            return 0
        size = self.path.stat().st_size
        return 0 if size > min(self.most, self.size or self.most) else size

    def require_at_most(self, size: int) -> None:
        if size > self.most:
            raise UserError(f"{size} bytes are more than the {self.most} that such a file may have")

    def begin(self, version: str, size: int | None) -> None:
        """Empty the file for another version of it."""
        self.path.write_bytes(b"")
        self.version, self.size, self.ours = version, size, True
        note = {"url": self.url, "version": version, "size": size}
        atomic_write_text(self.note, json.dumps(note))

    def forget(self) -> None:
        """Drop what has arrived, which is of no use."""
        self.path.write_bytes(b"")
        self.version, self.size, self.ours = "", None, False

    def check(self, check: Callable[[Path], None]) -> None:
        """Let `check` see the file; one that it raises for is not gone on from."""
        try:
            check(self.path)
        except Exception:
            self.forget()
            raise
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def tidy(self) -> None:
        """Remove what nobody can go on from."""
        if self.path.exists() and self.path.stat().st_size and (not self.ours or self.have()):
            return
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Keep other processes from working at `path`; yield whether one had to be waited for.

    On Windows, where an open file cannot be renamed, nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    with contextlib.ExitStack() as opened:
        for _ in range(_ATTEMPTS if fcntl else 0):
            file = opened.enter_context(path.open("ab"))
            waited |= _lock(file, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break  # else the other one has renamed or removed it
        yield waited


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock an open file until it is closed; return whether that took waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{path}: another process is at it; waiting", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError:  # a file system without locks
        pass
    return False
