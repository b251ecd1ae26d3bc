"""Time epochs of train.py, from the second on, when features are cached."""

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import own_arguments, report_seconds, trained_weights

REPO = Path(__file__).resolve().parent.parent
ROOTS = (REPO / "data", REPO.parent / "shared/data/mvtec", REPO / "lite_data")
IMAGES, SIZE, BATCH = 64, 256, 8
# Whole maps: a choice anomalib does not have; the same network and the same images.
OPTIONS = {"cflow_resnet18": ("train.fiber_batch=0", "train.sub_epochs=1", "data.rotation=0")}


def photographs(count: int) -> list[Path]:
    """Return good images of a bottle: of MVTec AD where it is at hand, else the bundled ones."""
    folder = next(found for root in ROOTS if (found := root / "bottle/train/good").is_dir())
    return sorted(folder.iterdir())[:count]


def main() -> None:
    """Measure `--repeat` epochs after the first one; the value is the number of trained weights."""
    options = own_arguments(__doc__)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for number, photo in enumerate(photographs(IMAGES)):
            (folder / f"photos/{number:03}.png").symlink_to(photo.resolve())
        seconds = _epochs(options.case, options.repeat + 1, folder)[1:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    report_seconds(statistics.median(seconds), peak, {"trained weights": _weights(options.case)})


def _epochs(preset: str, count: int, folder: Path) -> list[float]:
    overrides = [
        f"model.input_size={SIZE}", f"train.batch_size={BATCH}", "train.drop_last=false",
        # all images train but one
        f"data.holdout={1 / IMAGES}", *OPTIONS.get(preset, ()),
    ]  # fmt: skip
    command = [
        sys.executable, "train.py", "-cfg", f"configs/{preset}.yaml", "--data",
        str(folder / "photos"), "-cat", "photos", "--exp_dir", str(folder / "run"),
        "--epochs", str(count), "--allow-random-backbone", "--device", "cpu",
        *(word for each in overrides for word in ("-o", each)),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    log = (folder / "run/photos/log.jsonl").read_text(encoding="utf-8")
    events = map(json.loads, log.splitlines())
    return [event["seconds"] for event in events if event["event"] == "epoch"]


def _weights(preset: str) -> int:
    from engine import session
    from utils.config import load

    config = load(REPO / f"configs/{preset}.yaml", [])
    detector, _ = session.new_detector(config, allow_random=True)
    return trained_weights(detector.flow)


if __name__ == "__main__":
    main()
