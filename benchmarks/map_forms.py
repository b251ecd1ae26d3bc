"""Compare the ways to turn latents into a map on one trained FastFlow run.

`python -m benchmarks.map_forms EXP_DIR DATA_ROOT [CATEGORY]` prints a Markdown table.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from datasets.folder import Record, find_category
from engine import session
from engine.batches import in_order, read_ahead
from metrics.suite import evaluate
from models.detector import Detector
from models.scoring.fastflow import SCORES, FastFlowScorer
from utils.config import Config

BLURS = (0.0, 4.0)
COLUMNS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_0.3", "aupro_0.05")


def latents_of(
    detector: Detector, records: Sequence[Record], config: Config
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield latents and log-dets of the images, batch by batch."""
    batches = in_order(len(records), config.eval.batch_size)
    for (images,) in read_ahead(batches, session.image_reader(records, config)):
        with paddle.no_grad():
            yield detector.flow(detector.features(paddle.to_tensor(images)))


def main(arguments: Sequence[str]) -> int:
    """Print a row of metrics for every score and blur; image scores are maxima of the map."""
    exp_dir, root, category = [*arguments, "bottle"][:3]
    found, detector, _ = session.open_detector(exp_dir, category, last=True)
    records = session.labelled(find_category(Path(root), category).test)
    masks, _ = session.known_masks(records, found.config)
    labels = [record.label for record in records]
    outputs = list(latents_of(detector, records, found.config))
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
            values = evaluate(maps.max((1, 2)), labels, list(maps), masks).values
            cells = " | ".join(f"{values[name]:.3f}" for name in COLUMNS)
            print(f"| {score} | {blur:g} px | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
