"""Look through a category before training: what is there, what is missing, what is damaged."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.feature_cache import file_digest
from datasets.records import DEFECTIVE, NORMAL, Category, Record, some
from utils.errors import UserError
from utils.image import Size, image_mode, image_size, read_image, read_mask, read_mask_values

_SHOWN = 5  # sizes and values per line
_MAX_ASPECT_CHANGE = 1.5  # beyond this a warning: shapes look different to the network


@dataclass
class CheckReport:
    """What `check_category` found. `errors` make training or evaluation stop, `warnings` do not."""

    name: str
    root: Path
    layout: str
    counts: dict[str, dict[str, int]]  # split -> defect -> images
    sizes: Counter[Size] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    def render(self) -> str:
        """Return the report as text, errors last."""
        lines = [f"{self.name}: {self.layout} in {self.root}"]
        for split, counts in self.counts.items():
            kinds = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"  {split}: {sum(counts.values())} images ({kinds or 'none'})")
        sizes = [f"{w}x{h} ({count})" for (h, w), count in self.sizes.most_common(_SHOWN)]
        more = ", ..." if len(self.sizes) > _SHOWN else ""
        lines.append(f"  {len(self.sizes)} size(s), width x height: {', '.join(sizes)}{more}")
        modes = [f"{mode} ({count})" for mode, count in self.modes.most_common()]
        lines.append(f"  pixel format: {', '.join(modes)}")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"error: {text}" for text in self.errors]
        return "\n".join([*lines, "ok" if self.ok else "not ok"])


@dataclass(frozen=True)
class _Image:
    """What is known of one image after reading it, or why it cannot be read."""

    record: Record
    size: Size | None = None
    mode: str = ""
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _Masks:
    """What is known of the masks of one image."""

    record: Record
    problem: str = ""
    positive: bool = True
    size_differs: bool = False
    odd_values: Counter[float] = field(default_factory=Counter)  # pixels besides 0 and 255


def check_category(category: Category, input_size: Size | None = None) -> CheckReport:
    """Read every image and mask of a category once and report what a user should know.

    `input_size` (H, W) adds a warning about shapes that the network would see distorted.
    """
    report = CheckReport(
        category.name,
        category.root,
        category.layout,
        _counts(category),
        warnings=list(category.left_out),
    )
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        train = list(pool.map(_inspect_image, [*category.train, *category.holdout]))
        test = list(pool.map(_inspect_image, category.test))
        readable = {image.record.path for image in test if image.size}
        masked = [r for r in category.test if r.masks and r.path in readable]
        masks = list(pool.map(_inspect_masks, masked))
    report.sizes.update(image.size for image in train + test if image.size)
    report.modes.update(image.mode for image in train + test if image.size)
    report.errors += [image.problem for image in train + test if image.problem]
    report.errors += [item.problem for item in masks if item.problem]
    _check_counts(report, category)
    _check_masks(report, category, masks)
    _check_duplicates(report, train, test)
    if input_size:
        _check_aspect(report, input_size)
    return report


def _counts(category: Category) -> dict[str, dict[str, int]]:
    splits = {"train": category.train, "validation": category.holdout, "test": category.test}
    return {
        split: dict(Counter(record.defect for record in records))
        for split, records in splits.items()
        if records or split != "validation"
    }


def _inspect_image(record: Record) -> _Image:
    try:
        height, width, _ = read_image(record.path).shape
        return _Image(record, (height, width), image_mode(record.path), file_digest(record.path))
    except UserError as error:
        return _Image(record, problem=str(error))


def _inspect_masks(record: Record) -> _Masks:
    size, positive, differs = image_size(record.path), False, False
    odd: Counter[float] = Counter()
    try:
        for file in record.masks:
            mask, values = read_mask(file), read_mask_values(file)
            positive |= bool(mask.any())
            differs |= mask.shape != size
            found, counts = np.unique(values, return_counts=True)
            odd.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    except UserError as error:
        return _Masks(record, problem=str(error))
    del odd[0], odd[255]
    return _Masks(record, "", positive, differs, odd)


def _check_counts(report: CheckReport, category: Category) -> None:
    if not category.train or len(category.train) + len(category.holdout) < 2:
        report.errors.append(
            f"{len(category.train)} training image(s): at least 2 normal images are needed, one "
            "to train on and one to set the threshold"
        )
    labels = {record.label for record in category.test}
    if not category.test:
        report.warnings.append("no test images: nothing can be evaluated")
    elif not {NORMAL, DEFECTIVE} <= labels:
        missing = "normal" if NORMAL not in labels else "defective"
        report.warnings.append(f"no {missing} test images: AUROC and the like are not defined")


def _check_masks(report: CheckReport, category: Category, masks: Sequence[_Masks]) -> None:
    defective = [record for record in category.test if record.label == DEFECTIVE]
    missing = [record.path for record in defective if not record.masks]
    read = [item for item in masks if not item.problem]
    if missing and len(missing) == len(defective):
        report.warnings.append("no masks: only image metrics can be computed")
    elif missing:
        report.warnings.append(f"{len(missing)} defective image(s) without mask: {some(missing)}")
    empty = [item.record.path for item in read if not item.positive]
    if empty:
        report.warnings.append(f"{len(empty)} defective image(s) with an empty mask: {some(empty)}")
    differing = [item.record.path for item in read if item.size_differs]
    if differing:
        report.warnings.append(
            f"{len(differing)} image(s) whose mask has another size, to be resized: "
            f"{some(differing)}"
        )
    odd: Counter[float] = sum((item.odd_values for item in read), Counter())
    if odd:
        values = ", ".join(f"{value:g} ({count} px)" for value, count in odd.most_common(_SHOWN))
        report.warnings.append(
            f"{sum(bool(item.odd_values) for item in read)} mask(s) with values besides 0 and "
            f"255: {values}; above 127 counts as defective, above 0 in a mask without such values"
        )


def _check_duplicates(report: CheckReport, train: Sequence[_Image], test: Sequence[_Image]) -> None:
    trained = {image.digest: image.record.path for image in train if image.digest}
    same = [image.record.path for image in test if image.digest in trained]
    if same:
        report.warnings.append(
            f"{len(same)} test image(s) are also training images, byte by byte: {some(same)}"
        )


def _check_aspect(report: CheckReport, input_size: Size) -> None:
    wanted = input_size[1] / input_size[0]
    changes = [max(w / h / wanted, wanted * h / w) for h, w in report.sizes.elements()]
    distorted = sum(change > _MAX_ASPECT_CHANGE for change in changes)
    if distorted:
        report.warnings.append(
            f"{distorted} image(s) change their width-to-height ratio by up to "
            f"{max(changes):.1f} times at input size {input_size[1]}x{input_size[0]}"
        )
