"""Time the construction of anomalib's network, and weigh its state dict."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import arguments, report_seconds, timed
from benchmarks.peers.networks import ENCODER, build, torch, trained_weights


def main() -> None:
    """Measure; the file is without the backbone, as ours."""
    options = arguments(__doc__)
    seconds, network = timed(lambda: build(options.case, (256, 256)))
    head = {name: value for name, value in network.state_dict().items() if ENCODER not in name}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(head, file)
        size = file.stat().st_size / 1e6
    report_seconds(seconds, size, {"trained weights": trained_weights(network)})


if __name__ == "__main__":
    main()
