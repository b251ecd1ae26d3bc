"""Time a step of anomalib's FastFlow in PyTorch on features that are there."""

from typing import Any

import numpy as np

from benchmarks.bench_head import DECAY, RATE
from benchmarks.measure import arguments, report
from benchmarks.peers.networks import load, prepared, torch


def main() -> None:
    """Measure channels last, which is the faster layout, or as anomalib has it."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    folder, images, network = prepared(options.case)
    with np.load(folder / "features.npz") as file:
        features = [torch.from_numpy(file[name][: len(images)]) for name in file]
    network.train()
    load(network, folder / "anomalib.pt")
    if options.side.endswith("channels last"):
        network = network.to(memory_format=torch.channels_last)
        features = [each.contiguous(memory_format=torch.channels_last) for each in features]
    weights = [p for p in network.parameters() if p.requires_grad]
    adam = torch.optim.Adam(weights, lr=RATE, weight_decay=DECAY)

    def call() -> dict[str, float]:
        nats = _nats(network, features)
        adam.zero_grad()
        nats.backward()
        adam.step()
        return {"nats per dimension": nats.item()}

    return report(call, options.repeat)


def _nats(network: Any, features: list[Any]) -> Any:
    total: Any = 0.0
    dimensions = 0
    for norm, block, feature in zip(network.norms, network.fast_flow_blocks, features, strict=True):
        latent, log_det = block(norm(feature))
        total = total + 0.5 * (latent**2).sum((1, 2, 3)) - log_det
        dimensions += latent[0].numel()
    return (total / dimensions).mean()


if __name__ == "__main__":
    main()
