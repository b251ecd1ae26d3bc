"""What the drift alarm says of a trained run's images, as they are and changed: docs/thresholds.md.

Usage: python -m benchmarks.drift RUN DATA_ROOT [CATEGORY]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from utils import runtime

Change = Callable[[np.ndarray], np.ndarray]  # of (H, W, 3) float32 in 0..255
CHANGES: dict[str, Change] = {
    "as they are": lambda x: x,
    "2 % brighter": lambda x: 1.02 * x,
    "5 % brighter": lambda x: 1.05 * x,
    "10 % brighter": lambda x: 1.1 * x,
    "10 % darker": lambda x: 0.9 * x,
    "blurred, 2 px of 900": lambda x: cv2.GaussianBlur(x, (0, 0), 2),
    "blurred, 4 px of 900": lambda x: cv2.GaussianBlur(x, (0, 0), 4),
    "turned by 2 degrees": lambda x: _turned(x, 2),
    "noise, deviation 8": lambda x: x + np.random.default_rng(0).normal(0, 8, x.shape),
}


def _turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


def main(run: str, root: str, name: str = "bottle") -> None:
    """Print a table: the good test images under each change, and the defective ones."""
    runtime.prepare()
    from datasets.folder import find_category
    from datasets.records import NORMAL
    from engine import session
    from engine.evaluator import run as judge
    from metrics.drift import Drift
    from utils.image import read_image, to_input

    found, detector, calibration = session.open_detector(run, name, "last")
    if calibration is None or calibration.nll is None:
        sys.exit(f"{run}: no NLL of normal images; train again")
    normal, config = calibration.nll, found.config
    test = find_category(Path(root), name, config.data.layout).test
    good = [record.path for record in test if record.label == NORMAL]
    bad = [record.path for record in test if record.label != NORMAL]
    print("| images | number | mean NLL | z | alarm |\n|---|---|---|---|---|")
    rows = [(f"good, {change}", good, apply) for change, apply in CHANGES.items()]
    rows.append(("good, a third of them replaced by defective ones", good, CHANGES["as they are"]))
    rows.append(("defective", bad, CHANGES["as they are"]))
    for place, (title, paths, apply) in enumerate(rows):
        third = len(paths) // 3
        chosen = [*paths[third:], *bad[:third]] if place == len(CHANGES) else paths
        drift = Drift(normal)
        for path in chosen:
            pixels = np.clip(apply(read_image(path).astype(np.float32)), 0, 255).round()
            image = to_input(pixels.astype(np.uint8), config.model.input_size, config.data.resize)
            drift.add(judge(detector, image[None]).of(0).nll or 0.0)
        alarm = "yes" if drift.alarm else "no"
        print(f"| {title} | {len(chosen)} | {drift.mean:.4f} | {drift.z:+.1f} | {alarm} |")
    print(
        f"\nNormal: {normal.mean:.4f} ± {normal.std:.4f}, {normal.count} images; alarm beyond "
        f"{normal.limit:.1f}."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
