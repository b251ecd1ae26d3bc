"""Files from the network: whole or not at all, of a limited size, and no web page instead."""

import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_replace

TIMEOUT = 20.0  # seconds without a byte
_BLOCK = 1 << 20
_MISSING, _DENIED = (404, 410), (401, 403, 429)  # HTTP status


class Missing(UserError):
    """Say that the server does not have the file."""


class Denied(UserError):
    """Say that the server refuses, by status or with a web page in place of the file."""


def fetch(url: str, target: Path, most: int, check: Callable[[Path], None]) -> None:
    """Download `url` to `target`, which appears or changes only if all went well.

    `check` gets the file received and raises UserError for a wrong one; `most` limits its bytes.
    Raise Missing, Denied, or UserError for any other failure: one line each.
    """
    try:
        with atomic_replace(target) as temporary:
            _receive(url, temporary, most)
            check(temporary)
    except UserError as error:
        raise type(error)(f"{url}: {error}") from None
    except HTTPError as error:
        kinds = dict.fromkeys(_MISSING, Missing) | dict.fromkeys(_DENIED, Denied)
        raise kinds.get(error.code, UserError)(f"{url}: {error}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = " ".join(str(reason).split()) or type(error).__name__
        raise UserError(f"{url}: cannot be fetched ({text})") from None


def _receive(url: str, path: Path, most: int) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
        size = response.length or 0  # 0: the server does not say
        if size > most:
            raise UserError(f"{size} bytes are more than the {most} that such a file may have")
        page = response.headers.get_content_type() == "text/html"
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=url, disable=None) as bar:
            while block := response.read(_BLOCK):
                if page or (not file.tell() and _looks_like_page(block)):
                    raise Denied("sent a web page in place of the file")
                bar.update(file.write(block))
                if file.tell() > most:
                    raise UserError(f"more than the {most} bytes that such a file may have")
        if file.tell() < size:
            raise UserError(f"connection lost after {file.tell()} of {size} bytes")


def _looks_like_page(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"
