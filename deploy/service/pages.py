"""Pages of one file each, with headers that let a browser run nothing but what is in them."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

FOLDER = Path(__file__).resolve().parent


class Page:
    """One HTML file, read once."""

    def __init__(self, name: str) -> None:
        text = (FOLDER / name).read_text(encoding="utf-8")
        self._content = text.encode()
        self._policy = "; ".join(
            [
                "default-src 'none'",
                f"script-src {_hashes(text, 'script')}",
                f"style-src {_hashes(text, 'style')}",
                "img-src blob: data:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            ]
        )

    def response(self) -> Response:
        """Return the answer to a request for the page."""
        headers = {"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"}
        return Response(self._content, media_type="text/html; charset=utf-8", headers=headers)


def _hashes(text: str, tag: str) -> str:
    """Return the sources of a Content-Security-Policy for what stands in elements `tag`."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
    digests = (hashlib.sha256(content.encode()).digest() for content in found)
    return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests) or "'none'"
