"""Time anomalib's networks on the images of ours: in PyTorch, or exported by anomalib to OpenVINO.

With the weights of ours where that can be.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_inference import SAME_MAP
from benchmarks.measure import arguments, report
from benchmarks.peers.networks import load, prepared, torch, trained_weights

TOLERANCE = 1e-3  # relative to the largest value
Scored = tuple[Any, Any]  # arrays: B scores, and maps of which there are B as well


def main() -> None:
    """Measure; FastFlow's scores are brought to our unit, 1 above anomalib's."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    folder, images, network = prepared(options.case)
    known = {"trained weights": trained_weights(network)}
    if folder.name in SAME_MAP:
        load(network, folder / "anomalib.pt")
    network.eval()
    infer = in_torch(network, images)
    if options.side.endswith("OpenVINO"):
        expected = infer()
        infer = exported(network, images, options.threads, folder / "anomalib_openvino")
        check_same(infer(), expected)

    def call() -> dict[str, Any]:
        scores, maps = infer()
        if folder.name not in SAME_MAP:
            return known
        found = {f"score {i}": float(score) + 1 for i, score in enumerate(scores.ravel())}
        return known | found | {"map": float(maps[0].mean()) + 1}

    report(call, options.repeat)


def in_torch(network: Any, images: Any) -> Callable[[], Scored]:
    """Return what runs the network as it is."""

    def infer() -> Scored:
        with torch.inference_mode():
            found = network(images)
        return found.pred_score.numpy(), found.anomaly_map.numpy()

    return infer


def exported(network: Any, images: Any, threads: int, folder: Path) -> Callable[[], Scored]:
    """Return what runs the network by the file that anomalib's export makes of it, once."""
    openvino = importlib.import_module("openvino")
    file = next(folder.rglob("model.xml"), None)
    if file is None:  # takes minutes
        file = _host(network).to_openvino(folder, input_size=tuple(images.shape[2:]))
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    pixels = images.numpy()

    def infer() -> Scored:
        found = compiled(pixels)
        return found["pred_score"], found["anomaly_map"]

    return infer


def check_same(found: Scored, expected: Scored) -> None:
    """Stop where an export gives other scores or maps than the network it was made of."""
    for ours, theirs in zip(found, expected, strict=True):
        difference = np.abs(ours.ravel() - theirs.ravel()).max() / np.abs(theirs).max()
        if not difference < TOLERANCE:
            raise SystemExit(f"the exported network differs by {difference:.1e} of the largest")


def _host(network: Any) -> Any:
    """Return a module of Lightning with anomalib's export: without resizing and thresholds."""
    lightning = importlib.import_module("lightning")
    mixin = importlib.import_module("anomalib.models.components.base.export_mixin")

    def forward(self: Any, images: Any) -> Any:
        return self.model(images)

    parts = (mixin.ExportMixin, lightning.LightningModule)
    host = type("Host", parts, {"forward": forward})()
    host.model = network
    return host.eval()


if __name__ == "__main__":
    main()
