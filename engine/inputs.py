"""What a run reads: images of a category or features extracted from them, as sources of batches."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paddle
from numpy.typing import ArrayLike
from paddle import Tensor
from tqdm import tqdm

from datasets import extracted
from datasets.feature_cache import FeatureCache, cache_key
from datasets.folder import find_categories, find_category, is_category, split_holdout
from datasets.records import DEFECTIVE, NORMAL, UNKNOWN, Category, Record
from datasets.transforms import load_masks, load_pixels
from engine.batches import Augment, Read, Source, in_order, read_ahead
from utils.config import Config
from utils.errors import UserError
from utils.names import canonical_name

DEFAULT = ("bottle",)  # the category to train if none is given
SCALES = {"csflow": 3}  # sizes of the image that the backbone sees, where it is more than one


@dataclass(frozen=True)
class LabelledSet:
    """Labelled test images: their records, and where their features come from."""

    records: list[Record]
    source: Source

    @property
    def labels(self) -> list[int]:
        """Return the label of every image."""
        return [record.label for record in self.records]


@dataclass(frozen=True)
class TrainingInputs:
    """What a category trains on; `digest` names all of it and how it is seen.

    `sources` gives training and held-out features; it may take long, and write a cache.
    """

    train: int
    holdout: int
    digest: str
    test: LabelledSet
    sources: Callable[[paddle.nn.Layer], tuple[Source, Source]]
    validation: bool = False  # held out are the images that the data set has for it


def find_trainable(config: Config, wanted: Sequence[str]) -> list[Category]:
    """Return the categories to train, by name; "all" means every one there is.

    If `data.root` is itself a category, it may be called anything. No name at all means that
    category, or else bottle.
    """
    data = config.data
    root = Path(data.features or data.root)
    if data.features:
        wanted = wanted or DEFAULT
        known = {canonical_name(name): name for name in extracted.names(root)}
        names = [known.get(canonical_name(name), name) for name in wanted]
        names = list(known.values()) if "all" in wanted else names
        return [Category(name, root, "features", (), ()) for name in names]
    if not wanted and is_category(root):
        return [find_category(root, root.resolve().name, data.layout)]
    wanted = wanted or DEFAULT
    names = find_categories(root, data.layout) if "all" in wanted else list(wanted)
    found = [find_category(root, name, data.layout) for name in names]
    if len(found) == 1 and "all" not in wanted:
        same = canonical_name(wanted[0]) == canonical_name(found[0].name)
        found = found if same else [replace(found[0], name=wanted[0])]
    return found


def training_inputs(
    config: Config, category: Category, detector: paddle.nn.Layer, weight_hash: str
) -> TrainingInputs:
    """Return the inputs of a category: its images, or with `data.features` the arrays of them."""
    if config.data.features:
        return _from_arrays(config, category.name, weight_hash)
    train, holdout = _training_split(category, config)
    key = data_digest([*train, *holdout], config, weight_hash)
    return TrainingInputs(
        len(train), len(holdout), key, labelled_set(category.test, config, detector),
        lambda detector: _feature_sources(detector, train, holdout, config, key),
        validation=bool(category.holdout),
    )  # fmt: skip


def _training_split(
    category: Category, config: Config
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Return what to train on and what to hold out: the data set's own choice, or a random one."""
    if category.train and category.holdout:
        return category.train, category.holdout
    try:
        return split_holdout(category.train, config.data.holdout, config.train.seed)
    except UserError as error:
        raise UserError(f"{category.root}: {error}") from None


def labelled_set(
    records: Sequence[Record], config: Config, detector: paddle.nn.Layer
) -> LabelledSet:
    """Return those test images whose label is known."""
    known = [record for record in records if record.label != UNKNOWN]
    return LabelledSet(known, image_source(known, config, detector))


def image_source(records: Sequence[Record], config: Config, detector: paddle.nn.Layer) -> Source:
    """Return a source that reads images and runs the backbone on them."""
    turn = rotation(config.data.rotation) if config.data.rotation else None
    extract = detector.extractor(len(records))
    reader = image_reader(records, config)
    return Source(len(records), reader, lambda arrays: extract(_unit(arrays[0])), turn)


def _unit(pixels: Tensor) -> Tensor:
    """Bring pixels from 0..255 to [0, 1]: on the device, which gets a quarter of the bytes."""
    return pixels.astype("float32") / 255.0


def image_reader(records: Sequence[Record], config: Config) -> Read:
    """Return a function from indices (B,) to [images (B, 3, H, W) uint8]."""

    def read(indices: np.ndarray) -> list[np.ndarray]:
        chosen = [records[i] for i in indices]
        data = config.data
        return [load_pixels(chosen, config.model.input_size, data.resize, max(data.workers, 1))]

    return read


def rotation(degrees: float) -> Augment:
    """Return the augmentation of CFLOW-AD: turn by a random angle, nearest pixel, black corners."""

    def turn(arrays: list[np.ndarray], draws: Sequence[np.random.Generator]) -> list[np.ndarray]:
        turned = []
        for image, rng in zip(arrays[0], draws, strict=True):
            height, width = image.shape[1:]
            centre = ((width - 1) / 2, (height - 1) / 2)
            matrix = cv2.getRotationMatrix2D(centre, rng.uniform(-degrees, degrees), 1.0)
            pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
            moved = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_NEAREST)
            turned.append(moved.transpose(2, 0, 1))
        return [np.ascontiguousarray(np.stack(turned))]

    return turn


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


def data_digest(records: Sequence[Record], config: Config, weight_hash: str) -> str:
    """Return a key of everything that the frozen features of these images depend on."""
    model = config.model
    options = _backbone_options(config)
    taps: list[int | str] = [*model.strides, *([json.dumps(options)] if options else [])]
    return cache_key(
        [record.path for record in records], model.input_size, config.data.resize,
        model.backbone, taps, weight_hash,
    )  # fmt: skip


def feature_guard(config: Config, weight_hash: str) -> dict[str, Any]:
    """Return by config key what extracted features depend on, apart from the images."""
    model = config.model
    options = {f"model.{key}": value for key, value in _backbone_options(config).items()}
    return {
        "model.backbone": model.backbone, **options, "model.strides": list(model.strides),
        "model.input_size": list(model.input_size), "data.resize": config.data.resize,
        "backbone sha256": weight_hash,
    }  # fmt: skip


def _backbone_options(config: Config) -> dict[str, Any]:
    model = config.model
    options = {
        "padding": model.padding, "before_norm": model.before_norm, "last_block": model.last_block,
        "scales": SCALES.get(model.flow),
    }  # fmt: skip
    return {key: value for key, value in options.items() if value not in (None, False)}


def _from_arrays(config: Config, name: str, weight_hash: str) -> TrainingInputs:
    """Read what extract_features.py wrote; the split depends on the seed, as for images."""
    data = config.data
    found = extracted.read(Path(data.features or ""), name, feature_guard(config, weight_hash))
    count, holdout_count = len(found.train[0]), found.holdout
    if holdout_count:
        both = range(count)
        train, holdout = tuple(both[:-holdout_count]), tuple(both[-holdout_count:])
    else:
        train, holdout = split_holdout(range(count), data.holdout, config.train.seed)
    records = [
        Record(Path(path), NORMAL if label == 0 else DEFECTIVE, defect)
        for path, label, defect in zip(found.paths, found.labels, found.defects, strict=True)
    ]
    test = LabelledSet(records, Source(len(records), _rows(found.test, range(len(records))), list))
    parts = [Source(len(part), _rows(found.train, part), list) for part in (train, holdout)]
    return TrainingInputs(
        len(train), len(holdout), found.digest, test, lambda detector: (parts[0], parts[1]),
        validation=bool(found.holdout),
    )  # fmt: skip


def _rows(levels: Sequence[np.ndarray], chosen: ArrayLike) -> Read:
    rows = np.asarray(chosen, np.int64)
    return lambda indices: [np.array(level[rows[indices]]) for level in levels]


def _feature_sources(
    detector: paddle.nn.Layer,
    train: Sequence[Record],
    holdout: Sequence[Record],
    config: Config,
    key: str,
) -> tuple[Source, Source]:
    """Return sources of the features of training and held-out images.

    With `data.cache` they are extracted once and kept under `key`, unless images are turned.
    """
    if not config.data.cache or config.data.rotation:
        return image_source(train, config, detector), image_source(holdout, config, detector)
    cache = _open_cache(detector, [*train, *holdout], config, key)
    both = np.arange(len(train) + len(holdout))
    parts = [
        Source(len(part), _rows(cache.levels, part), list)
        for part in (both[: len(train)], both[len(train) :])
    ]
    return parts[0], parts[1]


def _open_cache(
    detector: paddle.nn.Layer, records: Sequence[Record], config: Config, key: str
) -> FeatureCache:
    folder = Path(config.data.cache_dir)
    cache = FeatureCache.open(folder, key)
    if cache is not None:
        return cache
    batches = in_order(len(records), min(config.train.batch_size, 8))
    images = image_reader(records, config)
    features = extract_batches(detector, images, batches)
    return FeatureCache.build(folder, key, len(records), features)


def extract_batches(
    detector: paddle.nn.Layer, read: Read, batches: list[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """Yield the backbone's maps of every batch of images, with a bar on screen."""
    extract = detector.extractor(sum(map(len, batches)))
    for (batch,) in tqdm(read_ahead(batches, read), "extract features", len(batches), disable=None):
        with paddle.no_grad():
            maps = extract(_unit(paddle.to_tensor(batch)))
        yield [level.numpy() for level in maps]
