"""Tables of figures for pages: metrics, published ones beside them, recall of each defect type."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from utils.html.page import Markup, element, joined, table
from utils.names import CATEGORIES
from utils.published import Size, Source, difference, sources
from utils.report import COLUMNS, FURTHER, Table, notes, number, tables, with_means

Row = Mapping[str, Any]
TILES = ("image_auroc", "pixel_auroc", "aupro_0.3", "miou", "false_alarm_rate", "miss_rate")
_TITLES = {key: title for columns in (COLUMNS, *FURTHER.values()) for title, key in columns}
METHODS = {"fastflow": "FastFlow", "cflow": "CFLOW-AD", "csflow": "CS-Flow", "uflow": "U-Flow"}
CAUTION = (
    "Published figures are mostly those of the best epoch or threshold on the test set, with the "
    "original backbone weights; a run that does not look at test labels is expected to lie lower."
)


def headline(rows: Sequence[Row]) -> Markup:
    """Show the few figures that matter most: of the one category, or the means."""
    means = with_means(rows)[len(rows) :]
    last = means[0] if means else rows[0]
    prefix = "mean " if means else ""
    tiles = [
        element(
            "div", element("dt", prefix + _TITLES[key]), element("dd", number(last["metrics"], key))
        )
        for key in TILES
    ]
    return element("dl", *tiles, class_="tiles")


def metric_tables(rows: Sequence[Row], more: Sequence[Table] = ()) -> Markup:
    """Show the tables of `utils.report`, and below them what they depend on."""
    parts = [
        table(each.head, each.body, each.means, caption=each.title or "Metrics, as fractions")
        for each in [*tables(rows), *more]
    ]
    lines = [element("li", line) for line in notes(rows)]
    return joined([*parts, element("ul", *lines, class_="notes soft")])


def published_table(rows: Sequence[Row]) -> Markup:
    """Show published figures of the same method and backbone beside these, and how far they go."""
    model = rows[0]["config"]["model"]
    known = sources(model["flow"])
    fitting = [source for source in known if source.backbone == model["backbone"]]
    title = element("h3", "Beside published figures")
    if not fitting:
        others = ", ".join(dict.fromkeys(source.backbone for source in known))
        text = (
            f"None is known of {METHODS[model['flow']]} on {model['backbone']}, only on {others}."
        )
        return joined([title, element("p", text, class_="soft")])
    shown = [row for row in rows if any(row["category"] in source.values for source in fitting)]
    if not shown and not _complete(rows):
        text = "None is known of these categories."
        return joined([title, element("p", text, class_="soft")])
    columns = [
        (key, place, source)
        for key in dict.fromkeys(k for s in fitting for v in s.values.values() for k in v)
        for place, source in enumerate(fitting, 1)
        if any(key in values for values in source.values.values())
    ]
    keys = list(dict.fromkeys(key for key, *_ in columns))
    head = ["category"]
    for key in keys:
        head += [_TITLES[key], *(f"published [{place}]" for k, place, _ in columns if k == key)]
    head.append("comparable?")
    body = [[*_beside(row, row["category"], keys, columns), _comparable(row)] for row in shown]
    means = [
        [*_beside(row, "mean", keys, columns), ""]
        for row in with_means(rows)[len(rows) :]
        if row["category"] == "mean" and _complete(rows)
    ]
    lines = [
        element("li", f"[{place}] {source.title}; {source.backbone}; {source.note}.")
        for place, source in enumerate(fitting, 1)
    ]
    laid_out = table(head, body, means, caption="This run, and what is published")
    warning = element("p", CAUTION, class_="soft")
    return joined([title, laid_out, warning, element("ul", *lines, class_="notes soft")])


def defect_table(row: Row) -> Markup:
    """Show how many images of each defect type, and of the good ones, are called defective."""
    images = row["images"]
    counts = Counter((image["label"], image["defect"]) for image in images)
    found = Counter((i["label"], i["defect"]) for i in images if i["defective"])
    judged = all(image["defective"] is not None for image in images)
    body = []
    for label, defect in sorted(counts, key=lambda kind: (-kind[0], kind[1])):
        count, called = counts[label, defect], found[label, defect]
        share = joined([f"{called / count:.3f} ", _bar(called / count)])
        cells = [f"{called} of {count}", share] if judged else [f"n/a of {count}", "n/a"]
        body.append([defect if label else f"{defect} (false alarms)", *cells])
    head = ["type", "called defective", "recall or false-alarm rate"]
    laid_out = table(head, body, caption="What the image threshold finds of each defect type")
    keys = ("image_fp",) if not judged else ("miss_rate", "false_alarm_rate")
    lines = [f"n/a: {row['reasons'][key]}" for key in keys if key in row["reasons"]]
    return joined([laid_out, *(element("p", line, class_="soft") for line in lines)])


def _bar(share: float) -> Markup:
    filled = element("span", style=f"width: {share:.1%}")
    return element("span", filled, class_="bar", role="presentation")


def _beside(
    row: Row, name: str, keys: Sequence[str], columns: Sequence[tuple[str, int, Source]]
) -> list[str]:
    cells = [row["category"]]
    for key in keys:
        cells.append(number(row["metrics"], key, row.get("spread")))
        for own, _, source in columns:
            if own == key:
                cells.append(number(source.values.get(name, {}), key, None))
    return cells


def _comparable(row: Row) -> str:
    labels = Counter(image["label"] for image in row["images"])
    size = Size(row["training_images"], labels[0], labels[1])
    why = difference(row["category"], size)
    return f"not comparable: {why}" if why else "the same images"


def _complete(rows: Sequence[Row]) -> bool:
    return {row["category"] for row in rows} >= set(CATEGORIES)
