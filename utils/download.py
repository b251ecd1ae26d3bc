"""Files from the network: whole or not at all, of a limited size, and no web page instead."""

import contextlib
import errno
import hashlib
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

from utils.errors import UserError
from utils.partial import Part, alone

TIMEOUT = 20.0  # seconds without a byte
PAUSES = (1.0, 3.0, 10.0)  # seconds, before a dropped connection is tried again
PROGRESS = 1 << 20  # bytes, after which the pauses begin anew
_BLOCK = 1 << 16
_MISSING, _DENIED = (404, 410), (401, 403, 429)  # HTTP status
_PASSING = (500, 502, 503, 504)
_NO_SUCH_RANGE = 416  # the file has become shorter


class Missing(UserError):
    """Say that the server does not have the file."""


class Denied(UserError):
    """Say that the server refuses, by status or with a web page in place of the file."""


class NoRoom(UserError):
    """Say that the disk is too full."""


class _Dropped(Exception):
    """Say that another try may help."""


def fetch(
    url: str,
    target: Path,
    most: int,
    check: Callable[[Path], None],
    *,
    verified: bool = False,
    unpacked: float = 0.0,
) -> None:
    """Download `url` to `target`, which appears or changes only if all went well.

    What has arrived lies in `<target>.part`. Another try, or the next call, goes on from there if
    the server tells versions of the file apart, or if `verified`: `check` knows its hash.
    `check` gets the file received and raises UserError for a wrong one; `most` limits its bytes.
    The disk must have room for it and for `unpacked` times as much.
    Raise Missing, Denied, or UserError for any other failure: one line each.
    """
    part = Part(target.with_name(f"{target.name}.part"), url, most, verified)
    with _one_line(part), alone(part.path) as waited:
        try:
            if waited and _passes(check, target):  # the other process has fetched it
                return
            part.load()
            _receive(part, unpacked)
            part.check(check)
            part.path.replace(target)
        finally:
            part.tidy()


def require_room(folder: Path, size: float) -> None:
    """Raise NoRoom if fewer than `size` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise NoRoom(
            f"{folder}: {size / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; "
            "make room or choose another folder"
        )


def file_hash(path: Path, method: str = "sha256") -> str:
    """Return the hash of a file of any size, as hexadecimal digits."""
    digest = hashlib.new(method, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _receive(part: Part, unpacked: float) -> None:
    """Fill the part, over as many connections as that takes."""
    pauses, best = list(PAUSES), part.have()
    while True:
        try:
            return _connect(part, unpacked)
        except _Dropped as error:
            if part.have() >= best + PROGRESS:
                pauses, best = list(PAUSES), part.have()
            if not pauses:
                raise UserError(str(error)) from None
            print(f"{part.url}: {error}; next try in {pauses[0]:g} s", file=sys.stderr)
            time.sleep(pauses.pop(0))


def _connect(part: Part, unpacked: float) -> None:
    have = part.have()
    if have and have == part.size:
        return  # stopped after the last byte
    with _ask(part, have) as response:
        start = _start(part, response, have)
        size = None if response.length is None else start + response.length
        part.require_at_most(size or 0)
        block = _read(response, start, size)
        page = response.headers.get_content_type() == "text/html"
        if page or (not start and _looks_like_page(block)):
            raise Denied("sent a web page in place of the file")
        if size is not None:
            require_room(part.path.parent, size - start + unpacked * size)
        if not start:
            part.begin(_version(response.headers), size)
        got = _write(part, response, block, start)
    whole = part.size if part.size is not None else size
    if whole is not None and got < whole:
        raise _Dropped(f"connection lost after {got} of {whole} bytes")


def _write(part: Part, response: HTTPResponse, block: bytes, start: int) -> int:
    """Append all that comes; return the size that the file has then."""
    name, whole = part.path.stem, part.size
    bar = tqdm(total=whole, initial=start, unit="B", unit_scale=True, desc=name, disable=None)
    with part.path.open("ab") as file, bar:
        while block:
            part.arriving = True
            bar.update(file.write(block))
            part.require_at_most(file.tell())
            block = _read(response, file.tell(), part.size)
        return file.tell()


def _ask(part: Part, have: int) -> HTTPResponse:
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and part.version:
        headers["If-Range"] = part.version
    request = urllib.request.Request(part.url, headers=headers)
    if request.type not in ("http", "https"):
        raise ValueError(f"unknown url type: {request.type}")
    try:
        response: HTTPResponse = urllib.request.build_opener(_Redirects).open(
            request, None, TIMEOUT
        )
        return response
    except HTTPError as error:
        if error.code == _NO_SUCH_RANGE:
            part.forget()
        elif error.code not in _PASSING:
            raise
        raise _Dropped(str(error)) from None
    except (URLError, InvalidURL) as error:  # no connection: no use to try again, unless it broke
        if not part.arriving:
            raise
        raise _Dropped(_reason(error)) from None
    except (OSError, HTTPException) as error:
        raise _Dropped(_reason(error)) from None


def _start(part: Part, response: HTTPResponse, have: int) -> int:
    """Return where in the file the answer begins."""
    if response.status != 206:
        return 0
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    size = int(found[2]) if found and found[2] != "*" else part.size
    version = _version(response.headers) or part.version
    same = part.size in (None, size) and part.version == version
    if not (found and int(found[1]) == have and same):
        part.forget()
        raise _Dropped("sent a part of another file")
    part.size = size
    return have


def _version(headers: HTTPMessage) -> str:
    """Return what tells versions of a file apart to the byte; empty if there is nothing."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow to other hosts, but never away from the web or to an unprotected connection."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: HTTPMessage, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise UserError(f"leads to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(response: HTTPResponse, got: int, size: int | None) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, HTTPException):
        of = "" if size is None else f" of {size}"
        raise _Dropped(f"connection lost after {got}{of} bytes") from None


def _looks_like_page(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def _passes(check: Callable[[Path], None], path: Path) -> bool:
    try:
        check(path)
    except (UserError, OSError):
        return False
    return True


@contextlib.contextmanager
def _one_line(part: Part) -> Iterator[None]:
    """Turn every failure into one line that begins with the address."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{part.url}: {error}") from None
    except HTTPError as error:
        kinds = dict.fromkeys(_MISSING, Missing) | dict.fromkeys(_DENIED, Denied)
        text = " ".join(str(error).split())
        raise kinds.get(error.code, UserError)(f"{part.url}: {text}") from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            rest = f"{(part.size - part.have()) / 1e9:.2f} GB" if part.size else "more"
            raise NoRoom(f"{part.path}: disk full; make room for {rest} and try again") from None
        raise UserError(f"{part.url}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, URLError) else error
    return f"cannot be fetched ({' '.join(str(reason).split()) or type(error).__name__})"
