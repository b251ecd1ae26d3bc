"""Small data, configurations and runs that several test modules build on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

import train
from engine import checkpoint, session
from engine.evaluator import Calibration
from metrics.threshold import fixed
from models.detector import Detector
from utils.config import Config, load

REPO = Path(__file__).resolve().parent.parent
PRESET = "fastflow_efficientnet_lite0"
TINY = (
    "model.input_size=64", "model.steps=2", "model.blur_sigma=1.0", "data.holdout=0.25",
    "data.workers=0", "train.batch_size=4", "eval.batch_size=4",
)  # fmt: skip
DEFECTS = ("broken_large", "broken_small", "contamination")


def copy_bottle(root: Path, *, train: int = 8, good: int = 3, defective: int = 2) -> Path:
    """Copy a part of lite_data to `<root>/bottle`; `defective` images of each kind of defect."""
    source, target = REPO / "lite_data/bottle", root / "bottle"
    wanted = {"train/good": train, "test/good": good}
    wanted |= {f"{part}/{d}": defective for part in ("test", "ground_truth") for d in DEFECTS}
    for folder, count in wanted.items():
        (target / folder).mkdir(parents=True)
        for file in sorted((source / folder).iterdir())[:count]:
            shutil.copy(file, target / folder)
    return root


def tiny_config(*overrides: str, preset: str = PRESET) -> Config:
    """Return a shipped configuration at 64×64 with two coupling steps."""
    return load(REPO / f"configs/{preset}.yaml", [*TINY, *overrides])


def arguments(data: Path, exp_dir: Path, *more: str) -> list[str]:
    """Return train.py's arguments for a tiny run of two epochs."""
    settings = [*TINY, f"data.cache_dir={exp_dir.parent / 'cache'}"]
    options = [text for setting in settings for text in ("-o", setting)]
    return [
        "-cfg", str(REPO / f"configs/{PRESET}.yaml"), "--data", str(data), "--exp_dir",
        str(exp_dir), "--device", "cpu", "--epochs", "2", *options, *more,
    ]  # fmt: skip


def train_tiny(data: Path, exp_dir: Path, *more: str) -> Path:
    """Train in this process; return the folder of the run."""
    assert train.main(arguments(data, exp_dir, *more)) == 0
    return exp_dir / "bottle"


def script(
    name: str, *args: str, cwd: Path = REPO, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout to its end, with its own paths and little else."""
    return subprocess.run(
        [sys.executable, str(REPO / name), *args],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env={**_environment(), **environment},
    )  # fmt: skip


def start(name: str, *args: str) -> "subprocess.Popen[bytes]":
    """Start a script of the checkout, its output thrown away."""
    return subprocess.Popen(
        [sys.executable, str(REPO / name), *args],
        cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment(),
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("FLAGS_", "PYTHONPATH"))}


def untrained_run(folder: Path, config: Config, category: str = "bottle") -> Detector:
    """Save a detector with shaken weights as both checkpoints of a run; return it.

    Backbone weights are random where none are bundled.
    """
    detector, backbone = session.new_detector(config, allow_random=True)
    shake(detector)
    settle(detector)
    meta: dict[str, Any] = {
        "category": category, "preset": PRESET, "backbone": backbone,
        "data": {"train": 0, "holdout": 0, "digest": ""}, "versions": {},
        "progress": {"epoch": 1, "step": 1, "best": {}, "best_epoch": 1, "loss": 0.0},
        "calibration": Calibration(fixed(0.5), fixed(0.5), (0.0, 1.0)).to_dict(),
    }  # fmt: skip
    for name in ("best", "last"):
        checkpoint.save(folder / name, detector, config, meta)
    detector.eval()
    return detector


def shake(detector: Detector, seed: int = 0) -> None:
    """Move every trained value a little, so that nothing is an identity by accident."""
    rng = np.random.default_rng(seed)
    for name, value in detector.head_state().items():
        if value.is_floating_point():
            noise = 0.02 * rng.standard_normal(value.shape).astype(np.float32)
            noise = abs(noise) if name.endswith("_variance") else noise
            value.set_value(value + paddle.to_tensor(noise))


def settle(detector: Detector) -> None:
    """Give batch norms of the flow the statistics of a few images, as training would."""
    norms = [layer for layer in detector.flow.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    if not norms:
        return
    kept = [layer._momentum for layer in norms]
    for layer in norms:
        layer._momentum = 0.0  # the running statistics become those of this batch
    detector.train()
    images = paddle.to_tensor(photographs(6, max(detector.input_size)))
    with paddle.no_grad():
        detector.objective(detector.features(images[:, :, : detector.input_size[0]]))
    for layer, momentum in zip(norms, kept, strict=True):
        layer._momentum = momentum
    detector.eval()


def photographs(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Return images (count, 3, size, size) of lite_data in [0, 1], defective ones among them."""
    from utils.image import read_image, to_input

    files = sorted((REPO / "lite_data/bottle/test").glob("*/*.png"))
    chosen = np.random.default_rng(seed).permutation(len(files))[:count]
    return np.stack([to_input(read_image(files[i]), (size, size)) for i in chosen])


@contextmanager
def changed(file: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def export(exp_dir: Path, bundle: Path, data: Path, *more: str) -> Path:
    """Export the detector of a run in this process; return the bundle's folder."""
    from deploy import export_model

    args = ["--exp_dir", str(exp_dir), "--save_inference_dir", str(bundle), "--data", str(data)]
    assert export_model.main([*args, *more]) == 0
    return bundle
