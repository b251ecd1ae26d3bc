"""Latency of inference by stage, in the labelled blocks that PaddlePaddle's test chains read."""

import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

STAGES = ("preprocess_time", "inference_time", "postprocess_time")
PERCENTILES = (50, 90, 99)


class Stopwatch:
    """Collect the seconds of each stage per batch; the first `warmup` batches do not count."""

    def __init__(self, warmup: int = 0) -> None:
        self.warmup = warmup
        self.samples = 0
        self._batches: list[dict[str, float]] = []
        self._open: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a `with` block as part of stage `name` of the current batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._open[name] = self._open.get(name, 0.0) + spent

    def batch_done(self, samples: int) -> None:
        """Close the current batch of `samples` images."""
        if self.warmup > 0:
            self.warmup -= 1
        else:
            self._batches.append(self._open)
            self.samples += samples
        self._open = {}

    def milliseconds(self) -> dict[str, np.ndarray]:
        """Return the time of every counted batch by stage, and their sum as `total_time`."""
        times = {
            name: 1e3 * np.array([batch.get(name, 0.0) for batch in self._batches])
            for name in STAGES
        }
        return {**times, "total_time": sum(times.values(), np.zeros(len(self._batches)))}

    def report(self, blocks: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the given blocks followed by the environment and the times per batch."""
        lines = []
        blocks = {"Env info": _environment(), **blocks}
        for title, values in blocks.items():
            lines += [f"----------------------- {title} -----------------------"]
            lines += [f"{name}: {value}" for name, value in values.items()]
        lines += ["----------------------- Perf info -----------------------"]
        lines += [f"cpu_rss(MB): {_peak_memory()}", f"data_num: {self.samples}"]
        if not self._batches:
            return "\n".join([*lines, "no batch was counted: more images than --warmup are needed"])
        times = self.milliseconds()
        total = float(times["total_time"].sum())
        lines += [
            f"total time spent(s): {total / 1e3:.4f}",
            f"throughput(images/s): {1e3 * self.samples / total:.2f}",
        ]
        for name, spent in times.items():
            marks = ", ".join(f"p{p}: {np.percentile(spent, p):.2f}" for p in PERCENTILES)
            share = 100 * float(spent.sum()) / total
            lines.append(f"{name}(ms): mean: {spent.mean():.2f}, {marks}, share: {share:.1f}%")
        return "\n".join(lines)


def _environment() -> dict[str, str]:
    return {
        "OS": platform.platform(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "n/a"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (1 << 20 if sys.platform == 'darwin' else 1 << 10):.1f}"
