"""Time training from image files to an image AUROC, without the evaluations in between."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bench_training import ROOTS
from benchmarks.measure import own_arguments, report_seconds

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "results/benchmarks_convergence"
GOAL, MOST_SECONDS = 0.99, 900


class Clock:
    """Add up seconds while it runs; stop the training once an AUROC reaches the goal."""

    def __init__(self) -> None:
        self.seconds, self.auroc, self.epochs, self._start = 0.0, math.nan, 0, time.perf_counter()

    def done(self, evaluate: Callable[[], float]) -> bool:
        """Evaluate an epoch while the clock stands still; tell whether to stop."""
        self.seconds += time.perf_counter() - self._start
        self.auroc = evaluate()
        self.epochs += 1
        self._start = time.perf_counter()
        return self.auroc >= GOAL or self.seconds > MOST_SECONDS

    def report(self) -> None:
        """Print the seconds; infinite if the goal was never reached."""
        reached = self.auroc >= GOAL
        report_seconds(self.seconds if reached else math.inf, self.epochs, {"goal": GOAL})


class _Reached(Exception):
    pass


def root() -> Path:
    """Return the folder of the bottle images."""
    return next(each for each in ROOTS if (each / "bottle/test").is_dir())


def prepare() -> None:
    """Write the bundled backbone for PyTorch."""
    from convert.to_torch import backbone_state
    from engine import session
    from utils.config import load
    from utils.torch_file import write_torch

    FOLDER.mkdir(parents=True, exist_ok=True)
    for preset in ("fastflow_efficientnet_lite0", "cflow_efficientnet_lite0"):
        config = load(REPO / f"configs/{preset}.yaml", [])
        detector, _ = session.new_detector(config, allow_random=False)
        write_torch(FOLDER / f"{preset}.pt", backbone_state(detector.backbone))


def main() -> None:
    """Prepare, or train one side on <preset>, seed <number>."""
    options = own_arguments(__doc__)
    if options.side == "prepare":
        return prepare()
    from datasets.folder import find_category
    from engine import inputs, session
    from engine.log import RunLog
    from engine.trainer import Trainer
    from utils.config import load

    preset, _, seed = options.case.partition(", seed ")
    with TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"train.seed={seed}", f"data.root={root()}", f"data.cache_dir={folder}/cache"]
        config = load(REPO / f"configs/{preset}.yaml", overrides)
        category = find_category(root(), "bottle", config.data.layout)
        detector, about = session.new_detector(config, allow_random=False)
        data = inputs.training_inputs(config, category, detector, about["sha256"])
        log = RunLog(folder / "run")
        trainer = Trainer(
            detector, config, folder / "run", log, label="bottle", meta={},
            objectives=session.training_objectives(detector, config),
        )  # fmt: skip

        def auroc() -> float:
            found = session.evaluate_test(detector, data.test, config, None)
            return found.metrics.values["image_auroc"]

        def judge(*_: object) -> dict[str, list[float]]:
            if clock.done(auroc):
                raise _Reached
            return {}

        clock = Clock()
        with contextlib.suppress(_Reached):
            trainer.fit(*data.sources(detector), judge)
        log.close()
    return clock.report()


if __name__ == "__main__":
    main()
