"""Time the construction of a large detector, and weigh its file of trained weights."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import own_arguments, report_seconds, timed, trained_weights
from models import build_detector
from utils.config import load

REPO = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure one side; there is nothing to warm up."""
    import paddle

    options = own_arguments(__doc__)
    config = load(REPO / f"configs/{options.case}.yaml", ["model.input_size=256"])
    seconds, detector = timed(lambda: build_detector(asdict(config.model)))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.pdparams"
        paddle.save(detector.head_state(), str(file))
        size = file.stat().st_size / 1e6
    report_seconds(seconds, size, {"trained weights": trained_weights(detector.flow)})


if __name__ == "__main__":
    main()
