"""Made-up chapters of a report: a small test set of patches, judged by a made-up detector."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metrics.suite import evaluate
from metrics.threshold import Threshold, fixed, is_defective
from utils.html.evaluation import PICTURES, Chapter, picture_side
from utils.html.gallery import Case, gallery
from utils.html.page import slug

CUTS = {"image": fixed(0.5), "pixel": fixed(0.5)}
SIZE = 32
SCALE = (0.0, 1.0)
DEFECTS = ("crack", "hole")


def names(good: int, bad: int) -> list[str]:
    """Return names of the images: good ones first, then defects in turn."""
    return [f"good/{i:03}.png" for i in range(good)] + [
        f"{DEFECTS[i % len(DEFECTS)]}/{i:03}.png" for i in range(bad)
    ]


def pictures(folder: Path, files: Sequence[str], size: int = SIZE) -> list[Path]:
    """Write an image of noise, which compresses worst, under each name."""
    rng = np.random.default_rng(0)
    paths = [folder / name for name in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return paths


def chapter(
    paths: Sequence[Path],
    scores: Sequence[float],
    *,
    category: str = "bottle",
    masked: bool = True,
    cuts: dict[str, Threshold] | None = CUTS,
    model: dict[str, Any] | None = None,
    of: int = 1,
    **changes: Any,
) -> Chapter:
    """Return the chapter of images whose folder tells whether they are good.

    A map is the score of its image inside a square, which is also its mask.
    """
    labels = [int(path.parent.name != "good") for path in paths]
    square = np.zeros((SIZE, SIZE), bool)
    square[8:20, 8:20] = True
    maps = [np.where(square, score, 0.1).astype(np.float32) for score in scores]
    truths = [square if label and masked else None for label in labels]
    image, pixel = (cuts or {}).get("image"), (cuts or {}).get("pixel")
    metrics = evaluate(scores, labels, maps, truths, image, pixel, names=[p.name for p in paths])
    verdicts = [None if image is None else is_defective(s, image) for s in scores]
    row = {
        "category": category,
        "settings": {"preset": "made_up", "epoch": 3, "seed": 0, "runs": 1},
        "metrics": {k: None if math.isnan(v) else v for k, v in metrics.values.items()},
        "reasons": metrics.reasons,
        "warnings": metrics.warnings,
        "thresholds": {"image": image and image.to_dict(), "pixel": pixel and pixel.to_dict()},
        "cost": {"seconds": 2.0, "memory_mb": 512, "training_seconds": None},
        "training_images": 209,
        "config": {"model": {"flow": "fastflow", "backbone": "resnet18", **(model or {})}},
        "images": [
            {"path": str(p), "defect": p.parent.name, "label": y, "score": s, "defective": v}
            for p, y, s, v in zip(paths, labels, scores, verdicts, strict=True)
        ],
        **changes,
    }
    middle = 0.5 if image is None else image.value
    cases = [
        Case(
            p, p.parent.name, y, s, v, (middle - s) if y else (s - middle), m,
            m > 0.5 if pixel else np.zeros_like(square), t,
        )
        for p, y, s, v, m, t in zip(paths, labels, scores, verdicts, maps, truths, strict=True)
    ]  # fmt: skip
    shown = gallery(cases, SCALE, slug(category), picture_side(of), PICTURES // of)
    return Chapter(
        row, metrics.curves, SCALE, "from good images", shown,
        {"training": {"numpy": "1.2.3"}, "evaluation": {}}, {"backbone": "a" * 64},
    )  # fmt: skip
