"""The report of one evaluation: figures, curves, wrong verdicts first, and where all of it is from.

It shows what eval.py computed; no metric is computed here.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from metrics.curves import Curve
from metrics.threshold import Threshold
from utils.html import charts
from utils.html.charts import Cut, Line
from utils.html.figures import defect_table, headline, metric_tables, published_table
from utils.html.gallery import Gallery, grid, legend
from utils.html.page import Markup, element, facts, folded, joined, page, slug
from utils.report import number

MOST_BYTES = 15_000_000  # of a report
PICTURES = 12_000_000  # of them, those of pictures; the rest is far more than the text needs
FIRST = 12  # wrong verdicts in sight; the others unfold on a click
OPEN = 3  # with more categories than these, each unfolds on a click
_ORACLES = {
    "youden_threshold": "Youden's", "f1_threshold": "best F1", "zero_miss_threshold": "no misses",
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """What the report shows of one category."""

    row: Mapping[str, Any]  # of results.json
    curves: Mapping[str, Curve]
    scale: tuple[float, float]  # map values at the ends of the colour map
    scale_origin: str
    gallery: Gallery
    versions: Mapping[str, Mapping[str, str]]  # of training and of evaluation
    hashes: Mapping[str, str]

    @property
    def category(self) -> str:
        """Return the name of the category."""
        return self.row["category"]


def picture_side(categories: int) -> int:
    """Return how many pixels a side of a picture may have, so that enough of them fit in."""
    return 384 if categories <= 2 else 288 if categories <= 6 else 224


def evaluation_page(chapters: Sequence[Chapter], date: str) -> str:
    """Return the report as one HTML document; `date` is printed as it is."""
    rows = [chapter.row for chapter in chapters]
    names = [chapter.category for chapter in chapters]
    title = names[0] if len(names) == 1 else f"{len(names)} categories"
    presets = ", ".join(dict.fromkeys(str(row["settings"]["preset"]) for row in rows))
    links = [element("a", name, href=f"#{slug(name)}") for name in names]
    return page(
        f"Evaluation: {title}",
        element("h1", f"Evaluation: {title}"),
        element("p", f"{presets} · evaluated {date}", class_="soft"),
        headline(rows),
        element("nav", *links, aria_label="categories") if len(names) > 1 else "",
        element("h2", "Figures"),
        metric_tables(rows),
        published_table(rows),
        *(_category(chapter, len(names)) for chapter in chapters),
    )


def _category(chapter: Chapter, of: int) -> Markup:
    parts = joined([
        *(element("p", text, class_="warning") for text in chapter.row.get("warnings", [])),
        element("p", verdict_line(chapter.row), class_="say"),
        element("h3", "Defect types"),
        defect_table(chapter.row),
        element("h3", "Scores and curves"),
        charts.side_by_side(_charts(chapter)),
        *_thresholds(chapter.row),
        *_pictures(chapter, "wrong"),
        *_pictures(chapter, "right"),
        element("h3", "How it was made"),
        *_origin(chapter),
    ])  # fmt: skip
    name = slug(chapter.category)
    if of == 1:
        return element("section", element("h2", chapter.category), parts, id=name)
    title = f"{chapter.category}: {_count(chapter.row)}"
    return folded(title, parts, unfolded=of <= OPEN, class_="category", id=name)


def verdict_line(row: Mapping[str, Any]) -> str:
    """Say how many verdicts are wrong, and in which way; or why there is none."""
    metrics = row["metrics"]
    good, bad = (Counter(image["label"] for image in row["images"])[label] for label in (0, 1))
    if metrics.get("image_fp") is None:
        reason = row["reasons"].get("image_fp", "no image threshold")
        return f"{good} good and {bad} defective test images; verdicts n/a: {reason}."
    alarms, misses = int(metrics["image_fp"]), int(metrics["image_fn"])
    return (
        f"{_count(row)}: {alarms} of {good} good images called defective, "
        f"{misses} of {bad} defective ones missed."
    )


def _count(row: Mapping[str, Any]) -> str:
    alarms, misses = (row["metrics"].get(key) for key in ("image_fp", "image_fn"))
    if alarms is None or misses is None:
        return f"{len(row['images'])} test images without verdicts"
    return f"{int(alarms + misses) or 'none'} of {len(row['images'])} verdicts wrong"


def _pictures(chapter: Chapter, kind: str) -> list[Markup]:
    shots: list[Markup] = getattr(chapter.gallery, kind)
    left_out: int = getattr(chapter.gallery, f"{kind}_left_out")
    if not shots and not left_out:
        return []
    judged = chapter.row["metrics"].get("image_fp") is not None
    title, order = {
        "wrong": ("Wrong verdicts", "the most wrong first"),
        "right": ("Right verdicts", "the nearest to the threshold first"),
    }[kind]
    if not judged:
        title, order = "Images", "those that look least like what they are first"
    pixel = chapter.row["thresholds"]["pixel"]
    on_map = pixel is not None and pixel["policy"] != "nfa"
    rest = f"; {left_out} more not shown" if left_out else ""
    above = [
        element("p", f"{len(shots)} images, {order}{rest}.", class_="soft"),
        legend(chapter.scale, pixel["value"] if on_map else None, chapter.scale_origin),
    ]
    if kind == "right" and judged:
        return [folded(f"{title} ({len(shots) + left_out})", *above, grid(shots))]
    more = len(shots) - FIRST
    below = [folded(f"{more} more", grid(shots[FIRST:]))] if more > 0 else []
    return [element("h3", title), *above, grid(shots[:FIRST]), *below]


def _charts(chapter: Chapter) -> list[Markup]:
    row, found = chapter.row, chapter.curves
    return [
        _histogram(row),
        _curves(row, found, "ROC", ("roc", "auroc", "AUROC"), "false-positive rate", "recall"),
        _curves(row, found, "Precision and recall", ("pr", "ap", "AP"), "recall", "precision"),
        _overlap(row, found),
    ]


def _curves(
    row: Mapping[str, Any],
    found: Mapping[str, Curve],
    title: str,
    keys: tuple[str, str, str],
    across: str,
    up: str,
) -> Markup:
    curve, metric, name = keys
    lines = [
        Line(f"{kind}s: {name} {number(row['metrics'], f'{kind}_{metric}')}", *found[key])
        for kind in ("image", "pixel")
        if (key := f"{kind}_{curve}") in found
    ]
    lacking = [f"{kind}_{metric}" for kind in ("image", "pixel") if f"{kind}_{curve}" not in found]
    reasons = [
        f"{k.partition('_')[0]}s: {row['reasons'][k]}" for k in lacking if k in row["reasons"]
    ]
    if not lines:
        return charts.missing(title, "; ".join(reasons) or "undefined")
    chart = charts.curves(title, lines, across, up)
    return charts.with_note(chart, "n/a for " + "; ".join(reasons)) if reasons else chart


def _overlap(row: Mapping[str, Any], found: Mapping[str, Curve]) -> Markup:
    title = "Region overlap (PRO)"
    if "overlap" not in found:
        return charts.missing(title, row["reasons"].get("aupro_0.3", "undefined"))
    metrics = row["metrics"]
    label = f"AUPRO 0.3: {number(metrics, 'aupro_0.3')}, 0.05: {number(metrics, 'aupro_0.05')}"
    line = Line(label, *found["overlap"])
    return charts.curves(title, [line], "false-positive rate", "mean overlap", end=0.3)


def _histogram(row: Mapping[str, Any]) -> Markup:
    by_label: dict[int, list[float]] = {0: [], 1: []}
    for image in row["images"]:
        by_label[image["label"]].append(image["score"])
    good, bad = (np.array(by_label[label]) for label in (0, 1))
    return charts.histogram("Scores of images", good, bad, _cuts(row))


def _cuts(row: Mapping[str, Any]) -> list[Cut]:
    """Return every threshold on the scores: the run's own, and those that know the labels."""
    cuts = []
    own = row["thresholds"]["image"]
    if own is not None and own["policy"] != "nfa":  # that one is compared with another value
        cuts.append(
            Cut(f"threshold of the run, {own['value']:.4g} ({own['policy']})", own["value"], True)
        )
    for key, name in _ORACLES.items():
        value = row["metrics"].get(key)
        if value is not None and math.isfinite(value):
            cuts.append(Cut(f"{name}, {value:.4g} (uses test labels)", value, False))
    return cuts


def _thresholds(row: Mapping[str, Any]) -> list[Markup]:
    lines = []
    for kind in ("image", "pixel"):
        stored = row["thresholds"][kind]
        text = Threshold.from_dict(stored).describe() if stored else f"threshold n/a: {_why(row)}"
        lines.append(element("li", f"{kind} {text}"))
    return [element("ul", *lines, class_="notes soft")]


def _why(row: Mapping[str, Any]) -> str:
    norm = row["settings"].get("norm")
    if norm:
        return f"scores of eval.norm {norm} depend on the other test images"
    return "none is stored with the run"


def _origin(chapter: Chapter) -> list[Markup]:
    row = chapter.row
    config = yaml.safe_dump(row["config"], sort_keys=False, allow_unicode=True)
    versions = [
        (f"{name}, {when}", version)
        for when, found in chapter.versions.items()
        for name, version in found.items()
    ]
    settings = [(name, str(value)) for name, value in row["settings"].items()]
    return [
        facts(_cost(row)),
        folded("Settings", facts(settings)),
        folded("Configuration", element("pre", config, tabindex=0)),
        folded("Versions", facts(versions)),
        folded("Hashes (sha256)", facts(chapter.hashes.items())),
    ]


def _cost(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, count = row["cost"], len(row["images"])
    seconds = cost.get("seconds")
    speed = f", {count / seconds:.3g} images/s with all metrics" if seconds else ""

    def text(key: str, unit: str) -> str:
        value = cost.get(key)
        return "n/a: not in the run's log" if value is None else f"{value:.4g} {unit}"

    return [
        ("evaluation", text("seconds", "s") + speed),
        ("memory of the evaluation, at most", text("memory_mb", "MB")),
        ("all epochs of the training", text("training_seconds", "s")),
        ("memory of the training, at most", text("training_memory_mb", "MB")),
    ]
