"""Time anomalib's networks in PyTorch on the images of ours, where it can be with its weights."""

from typing import Any

from benchmarks.bench_inference import SAME_MAP
from benchmarks.measure import arguments, report
from benchmarks.peers.networks import load, prepared, torch, trained_weights


def main() -> None:
    """Measure; FastFlow's scores are brought to our unit, 1 above anomalib's."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    folder, images, network = prepared(options.case)
    known = {"trained weights": trained_weights(network)}
    if folder.name in SAME_MAP:
        load(network, folder / "anomalib.pt")
    network.eval()

    def call() -> dict[str, Any]:
        with torch.inference_mode():
            found = network(images)
        if folder.name not in SAME_MAP:
            return known
        scores = {f"score {i}": score.item() + 1 for i, score in enumerate(found.pred_score)}
        return known | scores | {"map": found.anomaly_map[0].mean().item() + 1}

    report(call, options.repeat)


if __name__ == "__main__":
    main()
