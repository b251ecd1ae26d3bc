"""The service as a process on loopback, and small requests to it."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.small_run import REPO

START_SECONDS = 120


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A service that has been started."""

    process: "subprocess.Popen[bytes]"
    log: Path
    port: int = 0

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of the log that are JSON."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return a request's line of the log, which is written after the answer was sent."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            found = [e for e in self.events() if e.get("id") == request_id]
            if found:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"{request_id} is not in the log")

    def connect(self, seconds: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request on a connection of its own; `_` in names of headers stands for `-`."""
        connection = self.connect()
        try:
            return ask(connection, method, path, body, **headers)
        finally:
            connection.close()

    def predict(self, *files: Path | bytes, query: str = "", **headers: str) -> Answer:
        """Send files as a form."""
        body, kind = form(*files)
        return self.ask("POST", f"/predict{query}", body, content_type=kind, **headers)

    def metric(self, name: str) -> float:
        """Return a value of /metrics by its name with labels."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return next((float(x.rpartition(" ")[2]) for x in lines if x.startswith(f"{name} ")), 0.0)

    def wait(self, *states: str) -> dict[str, Any]:
        """Wait until /health gives one of these states."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            found = self.ask("GET", "/health").json
            if found["status"] in states:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never {states}: {found}")


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None,
    **headers: str,
) -> Answer:  # fmt: skip
    """Send one request on a connection that may be used again."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    found = connection.getresponse()
    return Answer(found.status, dict(found.headers.items()), found.read())


def form(*files: Path | bytes, field: str = "images") -> tuple[bytes, str]:
    """Return a multipart body of files or contents, and its content type."""
    parts = []
    for number, file in enumerate(files):
        name = file.name if isinstance(file, Path) else f"{number}.bin"
        data = file.read_bytes() if isinstance(file, Path) else file
        head = f'--x-y-z\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"'
        parts.append(head.encode() + b"\r\n\r\n" + data + b"\r\n")
    return b"".join(parts) + b"--x-y-z--\r\n", "multipart/form-data; boundary=x-y-z"


def picture(height: int = 40, width: int = 60, suffix: str = ".png", seed: int = 0) -> bytes:
    """Return the file of a smooth random picture."""
    rng = np.random.default_rng(seed)
    pixels = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (width, height))
    return cv2.imencode(suffix, pixels)[1].tobytes()


@contextmanager
def serving(
    folder: Path, *args: str, wait: bool = True, root: Path = REPO, **environment: str
) -> Iterator[Running]:
    """Start deploy/serve.py of `root` on a free port; end it with SIGKILL if it still runs."""
    log = folder / f"service-{time.monotonic_ns()}.log"
    known = {k: v for k, v in os.environ.items() if not k.startswith(("FLAGS_", "PYTHONPATH"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(root / "deploy/serve.py"), "--port", "0", *args],
            cwd=root, env={**known, **environment}, stdout=file, stderr=file,
        )  # fmt: skip
    running = Running(process, log)
    try:
        end = time.monotonic() + START_SECONDS
        while not (found := [e for e in running.events() if e["event"] == "listening"]):
            text = log.read_text(encoding="utf-8")
            assert process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.05)
        running.port = found[0]["port"]
        if wait:
            running.wait("ok")
        yield running
    finally:
        process.kill()
        process.wait()
