"""Runs on disk and the data they read, wired to detectors: what the scripts share.

The one module of this package that knows `models` and `datasets`; only scripts import it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from tqdm import tqdm

from datasets.feature_cache import FeatureCache, cache_key
from datasets.folder import DEFECTIVE, NORMAL, UNKNOWN, Record
from datasets.mvtec import canonical_name, report_order
from datasets.transforms import load_inputs, load_masks
from engine import checkpoint
from engine.batches import Read, in_order, read_ahead
from engine.checkpoint import Checkpoint
from engine.evaluator import Calibration, calibrate, evaluate_set
from engine.trainer import Select, Source
from metrics.suite import Metrics
from models import build_detector
from models.backbones.weights import load_weights
from models.detector import Detector
from utils.config import Config, differences, override
from utils.errors import UserError

RESULTS = Path("results")
EVALUATION_MAY_CHANGE = (
    "data.root", "data.workers", "eval.batch_size", "eval.size", "export.dir",
)  # fmt: skip


def run_folder(exp_dir: str, category: str = "") -> Path:
    """Return the folder of a run: `exp_dir` as it is if it has a slash, else below results/."""
    base = Path(exp_dir) if re.search(r"[/\\]", exp_dir) else RESULTS / exp_dir
    same = (p for p in base.glob("*") if canonical_name(p.name) == canonical_name(category))
    return base / category if (base / category).is_dir() else next(same, base / category)


def next_exp_dir(batch_size: int) -> str:
    """Return a free name below results/: exp_<batch>_<number of runs> (FastFlow-Paddle's)."""
    number = sum(path.is_dir() for path in RESULTS.glob("*"))
    while (RESULTS / f"exp_{batch_size}_{number}").exists():
        number += 1
    return f"exp_{batch_size}_{number}"


def trained_categories(exp_dir: str) -> list[str]:
    """Return the categories of an experiment that have a checkpoint, in the order of tables."""
    found = run_folder(exp_dir).glob(f"*/last/{checkpoint.META}")
    return report_order(path.parent.parent.name for path in found)


def chosen_category(exp_dir: str, given: str | None) -> str:
    """Return the category to load: the given one, the only trained one, or bottle."""
    if given:
        return given
    trained = trained_categories(exp_dir)
    if len(trained) == 1:
        return trained[0]
    if len(trained) > 1 and "bottle" not in trained:
        raise UserError(f"{run_folder(exp_dir)}: holds {', '.join(trained)}; choose one with -cat")
    return "bottle"


def new_detector(config: Config, *, allow_random: bool) -> tuple[Detector, dict[str, Any]]:
    """Build an untrained detector with backbone weights; return it and where those came from."""
    detector = build_detector(dataclasses.asdict(config.model), config.train.seed)
    info = load_weights(
        detector.backbone,
        Path(config.model.weights) if config.model.weights else None,
        allow_random=allow_random,
        seed=config.train.seed,
    )
    return detector, dataclasses.asdict(info)


def open_detector(
    exp_dir: str, category: str, *, last: bool
) -> tuple[Checkpoint, Detector, Calibration | None]:
    """Load a trained detector: its checkpoint, the network, and thresholds if they are fitted."""
    found = checkpoint.open_run(run_folder(exp_dir, category), "last" if last else "best")
    trained_on = found.meta["backbone"]
    detector, info = new_detector(found.config, allow_random=trained_on["origin"] == "random")
    if info["sha256"] != trained_on["sha256"]:
        raise UserError(
            f"{found.folder}: trained on backbone weights {trained_on['sha256'][:12]} "
            f"({trained_on['source']}), but {info['source']} is {info['sha256'][:12]}; "
            "put the former back or train again"
        )
    found.load_head(detector)
    detector.eval()
    stored = found.meta.get("calibration")
    return found, detector, Calibration.from_dict(stored) if stored else None


def image_reader(records: Sequence[Record], config: Config) -> Read:
    """Return a function from indices (B,) to [images (B, 3, H, W) in [0, 1]]."""

    def read(indices: np.ndarray) -> list[np.ndarray]:
        chosen = [records[i] for i in indices]
        data = config.data
        return [load_inputs(chosen, config.model.input_size, data.resize, max(data.workers, 1))]

    return read


def known_masks(records: Sequence[Record], config: Config) -> tuple[list[np.ndarray | None], int]:
    """Return the mask of every record at evaluation size, None if it is not known.

    The number counts masks whose file has another size than its image.
    """
    sizes = {"input": config.model.input_size, "256": (256, 256), "original": None}
    known = [index for index, record in enumerate(records) if record.has_truth]
    loaded, differing = load_masks(
        [records[index] for index in known], sizes[config.eval.size], config.data.workers
    )
    masks: list[np.ndarray | None] = [None] * len(records)
    for index, mask in zip(known, loaded, strict=True):
        masks[index] = mask
    return masks, differing


def calibrate_checkpoint(
    folder: Path, detector: Detector, holdout: Sequence[Record], config: Config
) -> Calibration:
    """Fit thresholds on held-out normals for the checkpoint in `folder`, and store them there.

    With them goes `config`, which a resumed run may have changed in part.
    """
    found = checkpoint.open_run(folder.parent, folder.name)
    found.load_head(detector)
    settings = config.eval
    calibration = calibrate(
        detector, image_reader(holdout, config), len(holdout), settings.batch_size,
        settings.image_threshold, settings.pixel_threshold,
    )  # fmt: skip
    checkpoint.update_meta(found, config=config.to_dict(), calibration=calibration.to_dict())
    return calibration


def evaluation_config(trained: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides to the configuration of a run; `UserError` for what training has fixed."""
    config = override(trained, overrides)
    for name in differences(trained, config):
        if name not in EVALUATION_MAY_CHANGE:
            raise UserError(
                f"-o {name}: training has fixed it; what may change afterwards is "
                f"{', '.join(EVALUATION_MAY_CHANGE)}"
            )
    return config


def evaluate_records(
    detector: Detector,
    records: Sequence[Record],
    config: Config,
    calibration: Calibration | None,
    *,
    allow_missing_masks: bool = False,
) -> tuple[Metrics, np.ndarray]:
    """Return metrics and scores (N,) of labelled test images; `UserError` if there are none."""
    if not records:
        raise UserError("no labelled test images: put them into test/good and test/<defect>")
    masks, differing = known_masks(records, config)
    metrics, scores = evaluate_set(
        detector, image_reader(records, config), [r.label for r in records], masks.__getitem__,
        [str(r.path) for r in records], batch_size=config.eval.batch_size,
        calibration=calibration, allow_missing_masks=allow_missing_masks,
    )  # fmt: skip
    if differing:
        metrics.warnings.append(f"{differing} mask(s) resized to the size of their images")
    return metrics, scores


def test_selector(detector: Detector, records: Sequence[Record], config: Config) -> Select | None:
    """Return FastFlow-Paddle's selection by test metrics, or None when `best` follows hold-out.

    The mean of both AUROCs rounded to three decimals decides, then pixel AUROC: optimistic.
    """
    if config.train.select_on == "holdout":
        return None
    known = labelled(records)
    if {record.label for record in known} != {NORMAL, DEFECTIVE}:
        raise UserError("--select-on test needs normal and defective images in test/")

    def select(epoch: int) -> list[float] | None:
        if epoch % config.train.test_epochs and epoch != config.train.epochs:
            return None
        values = evaluate_records(detector, known, config, None)[0].values
        image, pixel = round(values["image_auroc"], 3), round(values["pixel_auroc"], 3)
        return [image] if math.isnan(pixel) else [0.5 * image + 0.5 * pixel, pixel]

    return select


def labelled(records: Sequence[Record]) -> list[Record]:
    """Return the records whose label is known."""
    return [record for record in records if record.label != UNKNOWN]


def data_digest(records: Sequence[Record], config: Config, weight_hash: str) -> str:
    """Return a key of everything that the frozen features of these images depend on."""
    model = config.model
    return cache_key(
        [record.path for record in records], model.input_size, config.data.resize,
        model.backbone, model.strides, weight_hash,
    )  # fmt: skip


def feature_sources(
    detector: Detector, parts: Sequence[Sequence[Record]], config: Config, key: str
) -> list[Source]:
    """Return a source of features for each part of the training images.

    With `data.cache`, the features of all parts are extracted once and kept under `key`.
    """
    if not config.data.cache:
        return [Source(len(part), image_reader(part, config), _extract(detector)) for part in parts]
    records = [record for part in parts for record in part]
    cache = _open_cache(detector, records, config, key)
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return [
        Source(len(part), _shifted(cache, start), list)
        for part, start in zip(parts, starts, strict=False)
    ]


def _extract(detector: Detector) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda arrays: detector.features(arrays[0])


def _shifted(cache: FeatureCache, start: int) -> Read:
    return lambda indices: cache[indices + start]


def _open_cache(
    detector: Detector, records: Sequence[Record], config: Config, key: str
) -> FeatureCache:
    folder = Path(config.data.cache_dir)
    cache = FeatureCache.open(folder, key)
    if cache is not None:
        return cache
    batches = in_order(len(records), min(config.train.batch_size, 8))

    def features() -> Iterator[list[np.ndarray]]:
        images = read_ahead(batches, image_reader(records, config))
        for (batch,) in tqdm(images, "extract features", len(batches), disable=None):
            with paddle.no_grad():
                maps = detector.features(paddle.to_tensor(batch))
            yield [level.numpy() for level in maps]

    return FeatureCache.build(folder, key, len(records), features())
