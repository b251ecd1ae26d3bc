"""Time anomalib's training in PyTorch: its network, loss and optimiser in a plain loop.

Without Lightning's loop, callbacks and validation around it, which would only add to the time.
"""

import importlib
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.bench_training import BATCH, IMAGES, SIZE, photographs
from benchmarks.measure import arguments, report_seconds
from benchmarks.peers.networks import MODELS, build, torch, trained_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation
FIBRES = 64  # of a step, anomalib's default


class Photographs(torch.utils.data.Dataset):  # type: ignore[misc,unused-ignore]
    """Images of a folder, decoded and resized anew in every epoch, as anomalib does it."""

    def __init__(self, paths: Sequence[Path], normalisation: Any = IMAGENET) -> None:
        """Keep the files and how to normalise."""
        self.paths, self.normalisation = paths, normalisation

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """Return one image (3, H, W), normalised."""
        with Image.open(self.paths[index]) as image:
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        mean, deviation = self.normalisation
        pixels = (np.asarray(small, np.float32) / 255 - mean) / deviation
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32))


def main() -> None:
    """Measure `--repeat` epochs after the first one."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    network = build(options.case, (SIZE, SIZE)).train()
    step, optimiser = step_of(options.case, network), optimiser_of(options.case, network)
    photos = Photographs(photographs(IMAGES))
    images = torch.utils.data.DataLoader(photos, batch_size=BATCH, shuffle=True)
    seconds = []
    for _ in range(options.repeat + 1):
        start = time.perf_counter()
        for batch in images:
            step(network, optimiser, batch)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    values = {"trained weights": trained_weights(network)}
    report_seconds(statistics.median(seconds[1:]), peak, values)


def optimiser_of(preset: str, network: Any) -> Any:
    """Return anomalib's optimiser for a flow."""
    weights = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, dict[str, Any]] = {
        "fastflow": {"lr": 1e-3, "weight_decay": 1e-5}, "cflow": {"lr": 1e-4},
        "csflow": {"lr": 2e-4, "eps": 1e-4, "weight_decay": 1e-5, "betas": (0.5, 0.9)},
        "uflow": {"lr": 1e-3, "weight_decay": 1e-5},
    }  # fmt: skip
    return torch.optim.Adam(weights, **settings[preset.partition("_")[0]])


def step_of(preset: str, network: Any) -> Any:
    """Return what trains a network on one batch, (network, optimiser, images) -> None."""
    flow = preset.partition("_")[0]
    if flow == "cflow":
        return cflow_step
    name = {"fastflow": "FastflowLoss", "uflow": "UFlowLoss", "csflow": "CsFlowLoss"}[flow]
    module = importlib.import_module(f"{MODELS}.{flow}.loss")
    loss_of = getattr(module, name)()

    def step(network: Any, optimiser: Any, batch: Any) -> None:
        optimiser.zero_grad()
        loss_of(*network(batch)).backward()
        if flow == "csflow":
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()

    return step


def cflow_step(network: Any, optimiser: Any, batch: Any) -> None:
    """Train all levels on all positions of a batch, 64 at a time, as anomalib's module does."""
    parts = importlib.import_module(f"{MODELS}.cflow.utils")
    with torch.no_grad():
        found = network.encoder(batch)
    for level, layer in enumerate(network.pool_layers):
        features = found[layer]
        count, channels, height, width = features.shape
        code = parts.positional_encoding_2d(network.condition_vector, height, width)
        codes = code.expand(count, -1, -1, -1).permute(0, 2, 3, 1).flatten(0, 2)
        fibres = features.permute(0, 2, 3, 1).flatten(0, 2)
        for chosen in torch.randperm(len(fibres)).split(FIBRES):
            optimiser.zero_grad()
            latents, log_det = network.decoders[level](fibres[chosen], [codes[chosen]])
            log_prob = parts.get_logp(channels, latents, log_det) / channels
            (-torch.nn.functional.logsigmoid(log_prob)).mean().backward()
            optimiser.step()


if __name__ == "__main__":
    main()
