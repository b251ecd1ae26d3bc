"""Compare the ways to turn latents into a map on one trained FastFlow run.

`python -m benchmarks.map_forms EXP_DIR DATA_ROOT [CATEGORY]` prints a Markdown table.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from datasets.folder import find_category
from engine import session
from engine.batches import in_order
from engine.inputs import LabelledSet, known_masks, labelled_set
from metrics.suite import evaluate
from models.detector import Detector
from models.scoring.fastflow import SCORES, FastFlowScorer
from utils.config import Config

BLURS = (0.0, 4.0)
COLUMNS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_0.3", "aupro_0.05")


def latents_of(
    detector: Detector, test: LabelledSet, config: Config
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield latents and log-dets of the images, batch by batch."""
    for features in test.source.pyramids(in_order(test.source.count, config.eval.batch_size)):
        with paddle.no_grad():
            output = detector.flow(features)
        yield output


def main(arguments: Sequence[str]) -> int:
    """Print a row of metrics for every score and blur; image scores are maxima of the map."""
    exp_dir, root, category = [*arguments, "bottle"][:3]
    found, detector, _ = session.open_detector(exp_dir, category, "last")
    test = labelled_set(find_category(Path(root), category).test, found.config, detector)
    masks, _ = known_masks(test.records, found.config)
    outputs = list(latents_of(detector, test, found.config))
    sizes = [(z.shape[2], z.shape[3]) for z in outputs[0][0]]
    size = found.config.model.input_size
    print("| map | blur | " + " | ".join(COLUMNS) + " |")
    print("|---|---" + "|---" * len(COLUMNS) + "|")
    for score in SCORES:
        for blur in BLURS:
            scorer = FastFlowScorer(
                sizes, size, score=score, align_corners=False, blur_sigma=blur, score_from="smooth"
            )
            maps = np.concatenate([scorer(*output)[0].numpy()[:, 0] for output in outputs])
            values = evaluate(maps.max((1, 2)), test.labels, list(maps), masks).values
            cells = " | ".join(f"{values[name]:.3f}" for name in COLUMNS)
            print(f"| {score} | {blur:g} px | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
