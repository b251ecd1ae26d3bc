"""Engines that run a bundle: Paddle Inference on CPU or GPU."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bundle import Bundle, read_bundle
from utils.errors import UserError

SELF_CHECK_TOLERANCE = 1e-4  # of scores and maps
SELF_CHECK_SECONDS = 300.0


@dataclass(frozen=True)
class EngineOptions:
    """How to run: device, threads, and whether oneDNN kernels are wanted on the CPU."""

    use_gpu: bool = False
    gpu_id: int = 0
    cpu_threads: int = 1
    onednn: bool = False


class PaddleEngine:
    """Run a bundle with Paddle Inference."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.options = options
        self._predictor = _create_predictor(bundle, options)
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return maps (B, H, W), scores (B,) and evidence of images (B, 3, H, W) in [0, 1].

        Evidence is what the NFA test needs, (B, h, w) per level; empty in bundles without it.
        """
        self._input.reshape(images.shape)
        self._input.copy_from_cpu(np.ascontiguousarray(images, np.float32))
        self._predictor.run()
        anomaly_map, score, *evidence = (
            self._predictor.get_output_handle(name).copy_to_cpu()
            for name in self._predictor.get_output_names()
        )
        return anomaly_map[:, 0], score.reshape(-1), evidence


def _create_predictor(bundle: Bundle, options: EngineOptions) -> Any:
    import paddle
    from paddle import inference

    config = inference.Config(str(bundle.graph), str(bundle.parameters))
    if options.use_gpu:
        if not paddle.is_compiled_with_cuda():
            raise UserError(
                "--use_gpu: this Paddle build has no GPU support; install paddlepaddle-gpu (see "
                "README) or use --use_gpu False"
            )
        config.enable_use_gpu(256, options.gpu_id)  # MB of the initial memory pool
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(options.cpu_threads)
    if options.onednn and not options.use_gpu:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()  # on by default, and it breaks some operators
    config.enable_new_executor()  # without it, memory_optim fails for Paddle 3 graphs
    config.enable_memory_optim()
    config.disable_glog_info()
    return inference.create_predictor(config)


def create_engine(bundle: Bundle, options: EngineOptions) -> tuple[PaddleEngine, str]:
    """Return an engine and one line about oneDNN: used, or why not; empty if it was not asked for.

    oneDNN can crash or be wrong without notice, so it is tried in a child process first, against
    the plain kernels on the same input.
    """
    if not options.onednn or options.use_gpu:
        return PaddleEngine(bundle, options), ""
    fault = _self_check_fault(bundle, options.cpu_threads)
    if not fault:
        return PaddleEngine(bundle, options), "oneDNN: on (the self-check passed)"
    plain = EngineOptions(cpu_threads=options.cpu_threads)
    return PaddleEngine(bundle, plain), f"oneDNN: off ({fault})"


def _self_check_fault(bundle: Bundle, threads: int) -> str:
    command = [
        sys.executable, "-m", "deploy.engines", str(bundle.folder.resolve()), "--cpu_threads",
        str(threads),
    ]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        child = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True,
            timeout=SELF_CHECK_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the self-check took longer than {SELF_CHECK_SECONDS:.0f} s"
    if child.returncode == 0:
        return ""
    if child.returncode == 1 and child.stdout.strip():
        return child.stdout.strip().splitlines()[-1]
    return f"the self-check ended with code {child.returncode}"


def self_check(bundle: Bundle, threads: int) -> float:
    """Return the largest difference of scores and maps with oneDNN on and off, for 1 and 3 images.

    The images are seeded smooth noise.
    """
    rng = np.random.default_rng(0)
    coarse = rng.random((3, 3, 8, 8))
    height, width = bundle.input_size
    rows, columns = (np.linspace(0, 7, n).round().astype(int) for n in (height, width))
    images = coarse[:, :, rows][:, :, :, columns].astype(np.float32)
    images += rng.normal(0, 0.02, images.shape).astype(np.float32)
    engines = [
        PaddleEngine(bundle, EngineOptions(cpu_threads=threads, onednn=on)) for on in (False, True)
    ]
    worst = 0.0
    for count in (1, 3):
        plain, fast = (engine.run(images[:count]) for engine in engines)
        pairs = [*zip(plain[:2], fast[:2], strict=True), *zip(plain[2], fast[2], strict=True)]
        for a, b in pairs:
            scale = max(1.0, float(np.abs(a).max()))
            worst = max(worst, float(np.abs(a - b).max()) / scale)
            if not np.isfinite(b).all():
                return float("inf")
    return worst


def main(argv: Sequence[str]) -> int:
    """Run the self-check of a bundle; exit 0 if oneDNN may be used."""
    parser = argparse.ArgumentParser(description="Check whether oneDNN is right for a bundle.")
    parser.add_argument("bundle")
    parser.add_argument("--cpu_threads", type=int, default=1)
    args = parser.parse_args(argv)
    worst = self_check(read_bundle(args.bundle), args.cpu_threads)
    print(f"oneDNN differs by {worst:.2g} from the plain kernels")
    return 0 if worst <= SELF_CHECK_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
