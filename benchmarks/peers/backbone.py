"""Time the backbone of anomalib's FastFlow in PyTorch."""

from benchmarks.measure import arguments, report
from benchmarks.peers.networks import load, prepared, torch


def main() -> None:
    """Measure."""
    options = arguments(__doc__)
    torch.set_num_threads(options.threads)
    folder, images, network = prepared(options.case)
    load(network, folder / "anomalib.pt")
    backbone = network.feature_extractor.eval()

    def call() -> dict[str, float]:
        with torch.inference_mode():
            levels = backbone(images)
        return {f"level {i}": level.abs().mean().item() for i, level in enumerate(levels)}

    return report(call, options.repeat)


if __name__ == "__main__":
    main()
