"""A small web server that drops connections, ignores ranges, lies and redirects, as it is told."""

import contextlib
import hashlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Site:
    """What a server has and how it behaves; a test changes it between two requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    drops: list[int | None] = field(default_factory=list)  # of each answer: after so many bytes
    statuses: list[int] = field(default_factory=list)  # of each answer, until there are no more
    versions: str = "etag"  # "etag", "weak", "date" or "none"
    ranges: bool = True
    says_length: bool = True
    extra_length: int = 0  # that Content-Length has too many
    content_type: str = "application/octet-stream"
    wrong_range: bool = False  # answers with another part than asked for
    seconds: float = 0.0  # before each 16 kB
    address: str = ""
    asked: list[str] = field(default_factory=list)  # "<file>" or "<file> from N"
    sent: int = 0  # bytes of bodies

    def version(self, body: bytes) -> tuple[str, str]:
        """Return the header that tells versions apart, and its value."""
        digest = hashlib.sha256(body).hexdigest()[:16]
        return {
            "etag": ("ETag", f'"{digest}"'),
            "weak": ("ETag", f'W/"{digest}"'),
            "date": ("Last-Modified", f"Mon, 01 Jan 2024 00:00:{body[-1] % 60:02d} GMT"),
            "none": ("X-Version", "unknown"),
        }[self.versions]


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, name = self.site, self.path[1:]
        if name in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[name])
            self.end_headers()
            return
        body, start = site.files.get(name), self._start()
        site.asked.append(f"{name} from {start}" if start else name)
        status = site.statuses.pop(0) if site.statuses else 404 if body is None else 200
        if status != 200 or body is None:
            self.send_error(status)
            return
        if start and self.headers.get("If-Range") not in (None, site.version(body)[1]):
            start = 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self._answer(body, start)

    def _start(self) -> int:
        """Return where the part begins that is asked for; 0 for all of the file."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found and self.site.ranges else 0

    def _answer(self, body: bytes, start: int) -> None:
        site = self.site
        self.send_response(206 if start else 200)
        self.send_header(*site.version(body))
        self.send_header("Content-Type", site.content_type)
        if start:
            first = start - site.wrong_range
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if site.says_length:
            self.send_header("Content-Length", str(len(body) - start + site.extra_length))
        self.end_headers()
        drop = site.drops.pop(0) if site.drops else None
        rest = body[start:] if drop is None else body[start : start + drop]
        for begin in range(0, len(rest), 1 << 14):
            time.sleep(site.seconds)
            part = rest[begin : begin + (1 << 14)]
            site.sent += len(part)  # first: the client may be done before this thread goes on
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            super().handle()


@contextlib.contextmanager
def serve() -> Iterator[Site]:
    """Serve on a free port of this machine until the block ends."""
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.address = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
