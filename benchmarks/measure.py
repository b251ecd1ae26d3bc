"""What a measured process does: time a call, and print one line of JSON for the harness."""

import argparse
import ctypes
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from utils import runtime

Made = TypeVar("Made")
Call = Callable[[], Mapping[str, Any]]  # returns the numbers that both sides must agree on


def arguments(description: str | None, argv: Sequence[str] | None = None) -> Namespace:
    """Read what `benchmarks.run` asks of a measured process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--side", required=True, help="whose code is measured")
    parser.add_argument("--case", required=True, help="what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls; the median counts")
    return parser.parse_args(argv)


def own_arguments(description: str | None) -> Namespace:
    """Read it in a process of our own environment, which is set up as by our scripts."""
    runtime.prepare()
    return arguments(description)


def report(call: Call, repeat: int) -> None:
    """Call once to warm up, then `repeat` times; print values, median seconds and memory.

    `growth_mb` is the most memory held during the calls above what was held before them.
    """
    before = _start_of_peak()
    values = call()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    growth = None if before is None else _status("VmHWM") - before
    report_seconds(statistics.median(seconds), growth, values)


def trained_weights(flow: Any) -> int:
    """Return how many numbers of a flow of ours training changes."""
    return sum(int(p.size) for p in flow.parameters() if not p.stop_gradient)


def timed(make: Callable[[], Made]) -> tuple[float, Made]:
    """Return the seconds that one call takes, and what it makes."""
    start = time.perf_counter()
    made = make()
    return time.perf_counter() - start, made


def report_seconds(seconds: float, megabytes: float | None, values: Mapping[str, Any]) -> None:
    """Print what was measured otherwise."""
    line = {
        "seconds": seconds,
        "growth_mb": megabytes,
        "values": {name: float(value) for name, value in values.items()},
    }
    sys.stdout.write(json.dumps(line) + "\n")


def _start_of_peak() -> float | None:
    """Let the process's peak begin now, and return what is held, in MB; None but on Linux.

    What was freed before is given back, where it is kept: else calls would use it unseen.
    """
    if sys.platform != "linux":
        return None
    if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give_back(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kilobytes) * 1024 / 1e6
