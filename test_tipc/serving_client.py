"""Start the HTTP service, send images to it one by one, write what it says, and stop it.

Results are lines `name<TAB>{"score":..,"map_mean":..,"map_max":..}`, as of collect_results.py.
"""

import argparse
import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, Queue

KEYS = ("score", "map_mean", "map_max")
SECONDS = 120  # until the service is ready; for one answer; and until it has stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Do all of it; the service's command stands behind `--`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="a file or a folder")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("service", nargs="+", help="its command, behind --")
    args = parser.parse_args(argv)
    folder = args.images
    paths = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [folder]
    service = subprocess.Popen(args.service, stderr=subprocess.PIPE, text=True)
    try:
        address = _address(service)
        _wait(address, service)
        lines = [_line(address, path) for path in paths]
        service.send_signal(signal.SIGTERM)
        code = service.wait(SECONDS)
    finally:
        service.kill()
    if code != 0:
        sys.exit(f"error: the service ended with code {code} after SIGTERM")
    args.results.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} images through {address} in {args.results}; the service stopped as asked")
    return 0


def _address(service: "subprocess.Popen[str]") -> str:
    """Read the log until it names the port; go on reading, so that the service never blocks."""
    found: Queue[str] = Queue()

    def read(lines: Iterable[str]) -> None:
        for line in lines:
            sys.stderr.write(line)
            if match := re.search(r'"event": "listening", "host": "([^"]+)", "port": (\d+)', line):
                found.put(f"http://{match[1]}:{match[2]}")

    threading.Thread(target=read, args=(service.stderr,), daemon=True).start()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        try:
            return found.get(timeout=0.2)
        except Empty:
            continue
    sys.exit("error: the service did not say where it listens")


def _wait(address: str, service: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=SECONDS):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    sys.exit("error: the service did not become ready")


def _line(address: str, path: Path) -> str:
    body = json.dumps({"images": [base64.b64encode(path.read_bytes()).decode("ascii")]})
    request = urllib.request.Request(
        f"{address}/predict", body.encode("ascii"), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            (result,) = json.load(answer)["results"]
    except urllib.error.HTTPError as error:
        sys.exit(f"error: {path}: {error.code} {error.read().decode('utf-8', 'replace')}")
    values = json.dumps({key: result[key] for key in KEYS})
    return f"{path.as_posix()}\t{values}\n"


if __name__ == "__main__":
    sys.exit(main())
