"""What an evaluation leaves: its row of results.json, and its chapter of the report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.checkpoint import Checkpoint
from engine.evaluator import Calibration, Evaluation
from engine.log import training_cost
from metrics.threshold import Threshold, is_defective
from utils.config import Config
from utils.download import file_hash
from utils.html.evaluation import Chapter
from utils.html.gallery import Case, gallery
from utils.html.page import slug


class TestImage(Protocol):
    """What a result needs to know of an image of the test set."""

    @property
    def path(self) -> Path: ...
    @property
    def defect(self) -> str: ...
    @property
    def label(self) -> int: ...


def result_row(
    name: str,
    found: Checkpoint,
    config: Config,
    calibration: Calibration | None,
    images: Sequence[TestImage],
    evaluation: Evaluation,
    cost: dict[str, float | None],
) -> dict[str, Any]:
    """Return one row of results.json; `cost` is that of the evaluation, `seconds`, `memory_mb`."""
    metrics = evaluation.metrics
    measured = zip(images, evaluation.scores, evaluation.verdicts, strict=True)
    data = found.meta["data"]
    return {
        "category": name,
        "settings": _settings(found, config, calibration),
        "metrics": {k: None if math.isnan(v) else v for k, v in metrics.values.items()},
        "reasons": metrics.reasons,
        "warnings": metrics.warnings,
        "thresholds": {
            kind: cut.to_dict() if cut else None for kind, cut in _cuts(calibration).items()
        },
        "cost": {**training_cost(found.folder.parent), **cost},
        "training_images": data["train"] + data["holdout"] if data["train"] else None,
        "config": config.to_dict(),
        "images": [
            {
                "path": str(image.path),
                "defect": image.defect,
                "label": image.label,
                "score": float(score),
                "defective": verdict,
            }
            for image, score, verdict in measured
        ],
    }


def chapter(
    row: dict[str, Any],
    found: Checkpoint,
    calibration: Calibration | None,
    images: Sequence[TestImage],
    evaluation: Evaluation,
    versions: dict[str, str],
    *,
    side: int,
    budget: int,
) -> Chapter:
    """Return what the report shows of a category; its pictures take at most `budget` bytes.

    versions: those of this evaluation; side: of a picture, in pixels.
    """
    scale, origin = _scale(calibration, evaluation.pixels.maps)
    cases = _cases(calibration, images, evaluation)
    return Chapter(
        row=row,
        curves=evaluation.metrics.curves,
        scale=scale,
        scale_origin=origin,
        gallery=gallery(cases, scale, slug(row["category"]), side, budget),
        versions={"training": found.meta.get("versions", {}), "evaluation": versions},
        hashes=_hashes(found),
    )


def _cuts(calibration: Calibration | None) -> dict[str, Threshold | None]:
    if calibration is None:
        return {"image": None, "pixel": None}
    return {"image": calibration.image, "pixel": calibration.pixel}


def _scale(
    calibration: Calibration | None, maps: Sequence[np.ndarray]
) -> tuple[tuple[float, float], str]:
    if calibration is not None:
        return calibration.color_scale, "the same for all, from held-out normals"
    low = min(float(np.median(each)) for each in maps)
    high = max(float(each.max()) for each in maps)
    return (low, max(high, low + 1e-6)), "from these maps, for want of a calibration"


def _cases(
    calibration: Calibration | None, images: Sequence[TestImage], evaluation: Evaluation
) -> list[Case]:
    """Return the test images with how wrong each verdict is.

    Without a threshold they are judged by Youden's, or else by the score alone.
    """
    maps, masks, nfa = evaluation.pixels
    cut = evaluation.metrics.values["youden_threshold"]
    cut = calibration.image.value if calibration else 0.0 if math.isnan(cut) else cut
    by_nfa = calibration is not None and calibration.pixel.policy == "nfa"
    cases = []
    for place, image in enumerate(images):
        deciding = nfa[place] if by_nfa else maps[place]
        outside = np.zeros(deciding.shape, bool)
        distance = evaluation.deciding[place] - cut
        mask = masks[place]
        cases.append(
            Case(
                path=image.path, defect=image.defect, label=image.label,
                score=float(evaluation.scores[place]), defective=evaluation.verdicts[place],
                error=-distance if image.label else distance,
                anomaly_map=maps[place],
                predicted=is_defective(deciding, calibration.pixel) if calibration else outside,
                truth=None if mask is None else mask > 0,
            )
        )  # fmt: skip
    return cases


def _hashes(found: Checkpoint) -> dict[str, str]:
    meta = found.meta
    files = {path.name: file_hash(path) for path in sorted(found.folder.glob("head.*"))}
    own = {"backbone": meta["backbone"]["sha256"], "training images": meta["data"]["digest"]}
    if "converted" in meta:
        own[meta["converted"]["file"]] = meta["converted"]["sha256"]
    return {name: digest for name, digest in {**files, **own}.items() if digest}


def _settings(found: Checkpoint, config: Config, calibration: Calibration | None) -> dict[str, Any]:
    meta, model = found.meta, config.model
    which = found.folder.name
    if "converted" in meta:
        which = meta["converted"]["file"]
    elif which == "best":
        which += " on test" if config.train.select_on == "test" else " on hold-out"
    elif which != "last":
        which = f"{which.replace('_', ' by ')} on test"
    return {
        "preset": meta["preset"],
        "backbone": f"{model.backbone} ({meta['backbone']['origin']}, "
        f"sha256 {meta['backbone']['sha256'][:12]})",
        "input": "×".join(map(str, model.input_size)),
        "eval size": config.eval.size,
        "checkpoint": which,
        "epoch": meta["progress"]["epoch"],
        "image threshold": calibration.image.policy if calibration else "none",
        "pixel threshold": calibration.pixel.policy if calibration else "none",
        **({"norm": config.eval.norm} if config.eval.norm != "calibrated" else {}),
        "seed": config.train.seed,
        "runs": 1,
    }
