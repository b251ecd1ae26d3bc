"""Time the backbone of anomalib's FastFlow in PyTorch."""

import numpy as np

from benchmarks.bench_inference import parts
from benchmarks.measure import arguments, report
from benchmarks.peers.networks import build, load, normalised, torch


def main() -> None:
    """Measure, in the layout that is faster."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    folder, batch = parts(options.case)
    images = normalised(folder, np.load(folder / "images.npy")[:batch])
    network = build(folder.name, tuple(images.shape[2:]))
    load(network, folder / "anomalib.pt")
    backbone = network.feature_extractor.eval()

    def call() -> dict[str, float]:
        with torch.inference_mode():
            levels = backbone(images)
        return {f"level {i}": level.abs().mean().item() for i, level in enumerate(levels)}

    return report(call, options.repeat)


if __name__ == "__main__":
    main()
