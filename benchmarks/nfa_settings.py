"""Compare the settings of the a-contrario test on test images, from one trained run.

Usage: python -m benchmarks.nfa_settings EXP_DIR DATA_ROOT [CATEGORY]; the run has nfa.method tree.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.folder import find_category, split_holdout
from engine import session
from engine.evaluator import fit_acontrario, nfa_maps, score_all
from engine.inputs import image_source, known_masks, labelled_set
from metrics.nfa import TESTS
from metrics.suite import evaluate
from utils.config import override

COLUMNS = ("miou_nfa", "miou_nfa_oracle", "nfa_false_alarm_rate")


def main(arguments: Sequence[str]) -> int:
    """Print a row for every number of tests, with the standard null hypothesis and a fitted one."""
    exp_dir, root, category = [*arguments, "bottle"][:3]
    found, detector, _ = session.open_detector(exp_dir, category, "last")
    config = found.config
    images = find_category(Path(root), category)
    _, holdout = split_holdout(images.train, config.data.holdout, config.train.seed)
    normal = score_all(detector, image_source(holdout, config, detector), config.eval.batch_size)
    test = labelled_set(images.test, config, detector)
    output = score_all(detector, test.source, config.eval.batch_size)
    masks, _ = known_masks(test.records, config)
    print("| tests | calibrate | " + " | ".join(COLUMNS) + " | held-out with alarms |")
    print("|---|---" + "|---" * (len(COLUMNS) + 1) + "|")
    for tests in TESTS:
        for calibrate in (False, True):
            wanted = [f"nfa.tests={tests}", f"nfa.calibrate={calibrate}"]
            settings = override(config, wanted)
            chosen = fit_acontrario(detector, normal.evidence, settings)
            if chosen is None:
                sys.exit(f"{found.folder}: nfa.method is none; train with -o nfa.method=tree")
            maps = nfa_maps(chosen, output.evidence)
            values = evaluate(
                output.scores, test.labels, list(output.maps), masks, nfa_maps=maps
            ).values
            alarms = np.mean([nfa.max() > 0 for nfa in nfa_maps(chosen, normal.evidence)])
            cells = " | ".join(f"{values[name]:.3f}" for name in COLUMNS)
            print(f"| {tests} | {str(calibrate).lower()} | {cells} | {alarms:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
