"""Whether an engine gives the numbers of the trained model, and how fast: in a child process.

An engine can end its process or be wrong without notice, so it is never tried in this one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bundle import Bundle, read_bundle
from deploy.engines import Engine, EngineOptions, open_engine
from utils.errors import UserError
from utils.predictions import Output, joined

# Differences are relative to max(1, |value|): scores of CS-Flow reach thousands, its maps are z⁶.
# A trained flow amplifies rounding: in eager mode, float32 is 1e-5 (scores) and 1e-4 (maps) from
# float64 (FastFlow on bottle), so two engines that are both right can differ by more than that.
SCORE_TOLERANCE = 1e-4
MAP_TOLERANCE = 1e-3
REDUCED_TOLERANCE = 0.1  # of both, for fp16 and bf16: 8 to 11 binary digits through a whole network
SECONDS = 900.0  # for one engine
TIMED_RUNS, TIMED_SECONDS = 11, 5.0

CANDIDATES = {
    "paddle": EngineOptions(engine="paddle"),
    "paddle_onednn": EngineOptions(engine="paddle", onednn=True),
    "onnx": EngineOptions(engine="onnx"),
    "openvino": EngineOptions(engine="openvino"),
}


@dataclass(frozen=True)
class Sample:
    """Images (B, 3, H, W) and what the trained model says of them."""

    images: np.ndarray
    expected: Output

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        expected = self.expected
        arrays = {"images": self.images, "maps": expected.maps, "scores": expected.scores}
        arrays |= {f"evidence_{i}": level for i, level in enumerate(expected.evidence)}
        arrays |= {} if expected.nll is None else {"nll": expected.nll}
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Sample":
        """Read what `save` wrote."""
        with np.load(path) as file:
            count = sum(name.startswith("evidence_") for name in file.files)
            evidence = [file[f"evidence_{i}"] for i in range(count)]
            nll = file["nll"] if "nll" in file.files else None
            return cls(file["images"], Output(file["maps"], file["scores"], evidence, nll))


def check(name: str, folder: Path, sample: Path, threads: int) -> dict[str, Any]:
    """Try one of CANDIDATES on the bundle in `folder`; return its entry for inference.yml."""
    options = replace(CANDIDATES[name], cpu_threads=threads)
    found = _in_child(folder, options, "--sample", str(sample.resolve()))
    return _entry(found) | {"threads": threads}


def summary(entry: Mapping[str, Any]) -> str:
    """Return one line for people about an entry."""
    if "ms" not in entry:
        return f"not usable: {entry['reason']}"
    return (
        f"score differs by at most {entry['max_score_difference']:.2g}, map by "
        f"{entry['max_map_difference']:.2g}, {entry['ms']:g} ms per image"
        f"{'' if entry['passed'] else '; not used: more than it may'}"
    )


def self_check(bundle: Bundle, options: EngineOptions) -> str:
    """Compare with Paddle's plain kernels on seeded noise; return "" or what is wrong."""
    entry = _entry(_in_child(bundle.folder, options), options.precision)
    return "" if entry["passed"] else entry["reason"]


def _entry(found: Mapping[str, Any], precision: str = "fp32") -> dict[str, Any]:
    if "reason" in found:
        return {"passed": False, **found}
    score, other = found["max_score_difference"], found["max_map_difference"]
    limits = (SCORE_TOLERANCE, MAP_TOLERANCE)
    if precision != "fp32":
        limits = (REDUCED_TOLERANCE, REDUCED_TOLERANCE)
    if score <= limits[0] and other <= limits[1]:  # false for nan
        return {"passed": True, **found}
    reason = f"score differs by {score:.2g}, map by {other:.2g} from what it should be"
    return {"passed": False, **found, "reason": reason}


def _in_child(folder: Path, options: EngineOptions, *more: str) -> dict[str, Any]:
    """Return what the child measured, or only a `reason`."""
    command = [
        sys.executable, "-m", "deploy.parity", str(folder.resolve()), *more,
        "--engine", options.engine, "--cpu_threads", str(options.cpu_threads),
        "--precision", options.precision, *(["--onednn"] if options.onednn else []),
    ]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    try:
        child = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
            text=True, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"reason": f"it took longer than {SECONDS:.0f} s"}
    if child.returncode == 0:
        return json.loads(child.stdout.strip().splitlines()[-1])
    if child.returncode == 2 and child.stderr.strip():
        return {"reason": child.stderr.strip().splitlines()[-1]}
    return {"reason": f"it ended with code {child.returncode}"}


def measure(engine: Engine, sample: Sample) -> dict[str, float]:
    """Compare an engine with a sample at batch sizes 1 and 5, then time it at batch size 1."""
    count = len(sample.images)
    batches = [[0], [1 % count], [2 % count], [i % count for i in range(3, 8)]]
    score = other = 0.0
    for batch in batches:
        found, expected = engine.run(sample.images[batch]), sample.expected
        score = max(score, difference(found.scores, expected.scores[batch]).max())
        if found.nll is not None and expected.nll is not None:
            score = max(score, difference(found.nll, expected.nll[batch]).max())
        other = max(other, difference(found.maps, expected.maps[batch]).max())
        for level, expected_level in zip(found.evidence, expected.evidence, strict=True):
            # the mean, since one latent at the edge of a quantile moves a count by a whole 1
            other = max(other, difference(level, expected_level[batch]).mean())
    return {
        "ms": round(_milliseconds(engine, sample.images[:1]), 2),
        "max_score_difference": float(score),
        "max_map_difference": float(other),
    }


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return |found − expected| / max(1, |expected|); infinite where `found` is not finite."""
    if found.shape != expected.shape:
        raise UserError(f"it returned the shape {found.shape} instead of {expected.shape}")
    relative = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    return np.where(np.isfinite(relative), relative, np.inf)


def _milliseconds(engine: Engine, image: np.ndarray) -> float:
    """Return the median time of a run."""
    times: list[float] = []
    end = time.perf_counter() + TIMED_SECONDS
    while len(times) < 3 or (len(times) < TIMED_RUNS and time.perf_counter() < end):
        start = time.perf_counter()
        engine.run(image)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def noise_sample(bundle: Bundle, threads: int) -> Sample:
    """Return seeded smooth noise and what the bundle says of it with Paddle's plain kernels."""
    rng = np.random.default_rng(0)
    coarse = rng.random((8, 3, 8, 8))
    rows, columns = (np.linspace(0, 7, n).round().astype(int) for n in bundle.input_size)
    images = coarse[:, :, rows][:, :, :, columns].astype(np.float32)
    images += rng.normal(0, 0.02, images.shape).astype(np.float32)
    plain = open_engine(bundle, EngineOptions(cpu_threads=threads))
    return Sample(images, joined([plain.run(images[i : i + 1]) for i in range(len(images))]))


def main(argv: Sequence[str]) -> int:
    """Measure one engine; print the result as JSON."""
    parser = argparse.ArgumentParser(description="Compare an engine with the trained model.")
    parser.add_argument("bundle")
    parser.add_argument("--sample", type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--cpu_threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--onednn", action="store_true")
    args = parser.parse_args(argv)
    options = EngineOptions(
        engine=args.engine, cpu_threads=args.cpu_threads, precision=args.precision,
        onednn=args.onednn,
    )  # fmt: skip
    try:
        bundle = read_bundle(args.bundle)
        engine = open_engine(bundle, options)
        given = Sample.load(args.sample) if args.sample else None
        print(json.dumps(measure(engine, given or noise_sample(bundle, args.cpu_threads))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
