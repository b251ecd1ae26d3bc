"""Tables of results: console, Markdown, and means over categories and seeds.

`python -m utils.report results/*/results.json` prints the Markdown table of several runs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from utils import cli
from utils.errors import UserError
from utils.names import OBJECTS, TEXTURES

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, str]]  # title, metric

COLUMNS = (
    ("image AUROC", "image_auroc"),
    ("pixel AUROC", "pixel_auroc"),
    ("image AP", "image_ap"),
    ("pixel AP", "pixel_ap"),
    ("image F1-max*", "image_f1_max"),
    ("pixel F1-max*", "pixel_f1_max"),
    ("AUPRO 0.3", "aupro_0.3"),
    ("AUPRO 0.05", "aupro_0.05"),
    ("mIoU", "miou"),
    ("false alarms", "false_alarm_rate"),
    ("misses", "miss_rate"),
)
FURTHER = {  # tables below the first, for rows that have these values
    "Thresholds chosen with test labels (oracles, not for deployment)": (
        ("Youden: threshold", "youden_threshold"),
        ("over-kill", "youden_overkill"),
        ("misses", "youden_miss"),
        ("zero misses: threshold", "zero_miss_threshold"),
        ("over-kill", "zero_miss_overkill"),
    ),
    "A-contrario segmentation": (
        ("mIoU @ log NFA = 0", "miou_nfa"),
        ("mIoU @ oracle NFA*", "miou_nfa_oracle"),
        ("images with alarms", "nfa_false_alarm_rate"),
        ("mIoU of the map @ oracle*", "miou_oracle"),
    ),
}
ORACLE = "* uses test labels (F1-max, oracle): not a threshold that can be deployed."


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Add the mean over categories, and over textures and objects where all of them are there."""
    by_name = {row["category"]: row for row in rows}
    if not 1 < len(rows) == len(by_name):  # several runs of one category have no common mean
        return list(rows)
    groups = {"mean": list(rows)}
    for title, names in (("mean textures", TEXTURES), ("mean objects", OBJECTS)):
        if all(name in by_name for name in names):
            groups[title] = [by_name[name] for name in names]
    return [*rows, *({"category": title, "metrics": _mean(g)} for title, g in groups.items())]


def console_table(rows: Sequence[Row]) -> str:
    """Lay out rows with aligned columns; undefined values are `n/a`."""
    lines = []
    for title, table in _tables(rows):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [f"\n{title}:"] if title else []
        lines += ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in table]
    return "\n".join([*lines, *_notes(rows)])


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay out rows as Markdown, with what they depend on below."""
    lines = []
    for title, (head, *body) in _tables(rows):
        lines += [f"{title}:", ""] if title else []
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += [*("| " + " | ".join(cells) + " |" for cells in body), ""]
    return "\n".join([*lines, *_notes(rows)]) + "\n"


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """Return title, head and body of every table; the further ones where rows have their values."""
    everything = with_means(rows)
    tables = [("", _table(everything, COLUMNS))]
    for title, columns in FURTHER.items():
        own = [key for _, key in columns if key != "miou_oracle"]  # which every flow has
        known = [row for row in everything if any(_is_known(row["metrics"].get(k)) for k in own)]
        tables += [(title, _table(known, columns))] if known else []
    return tables


def _table(rows: Sequence[Row], columns: Columns) -> list[list[str]]:
    head = ["category", *(title for title, _ in columns)]
    return [head, *([row["category"], *_cells(row, columns)] for row in rows)]


def seed_style_lines(rows: Sequence[Row]) -> str:
    """Return FastFlow-Paddle's console lines, one per category and a mean."""
    lines = [
        f"{row['category']:15}  pixel auroc:{_number(row['metrics'], 'pixel_auroc')}   "
        f"image auroc:{_number(row['metrics'], 'image_auroc')}"
        for row in with_means(rows)
    ]
    return "\n".join(lines)


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that differ in the seed only: mean and sample standard deviation."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = {k: v for k, v in row["settings"].items() if k not in ("seed", "epoch")}
        groups.setdefault(json.dumps([row["category"], same], sort_keys=True), []).append(row)
    return [_merged(group) for group in groups.values()]


def _merged(group: list[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    seeds = sorted(row["settings"]["seed"] for row in group)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{group[0]['category']}: two results of one seed ({seeds}); give one each")
    spread = {}
    for key in group[0]["metrics"]:
        values = [row["metrics"].get(key) for row in group]
        known = [v for v in values if v is not None]
        spread[key] = stdev(known) if len(known) == len(group) else None
    settings = {**group[0]["settings"], "seed": ", ".join(map(str, seeds)), "runs": len(group)}
    settings["epoch"] = ", ".join(str(row["settings"]["epoch"]) for row in group)
    return {**group[0], "metrics": _mean(group), "spread": spread, "settings": settings}


def _mean(rows: Sequence[Row]) -> dict[str, float | None]:
    keys = rows[0]["metrics"]
    means: dict[str, float | None] = {}
    for key in keys:
        values = [row["metrics"].get(key) for row in rows]
        means[key] = None if any(v is None for v in values) else fmean(values)
    return means


def _cells(row: Row, columns: Columns) -> list[str]:
    return [_number(row["metrics"], key, row.get("spread")) for _, key in columns]


def _number(metrics: Mapping[str, float | None], key: str, spread: Any = None) -> str:
    value = metrics.get(key)
    if value is None or math.isnan(value):
        return "n/a"
    deviation = (spread or {}).get(key)
    return f"{value:.3f}" if deviation is None else f"{value:.3f} ± {deviation:.3f}"


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [ORACLE]
    grouped: dict[str, list[str]] = {}
    for row in rows:
        text = ", ".join(f"{k}: {v}" for k, v in row["settings"].items())
        grouped.setdefault(text, []).append(row["category"])
    notes += [f"{', '.join(names)} — {text}." for text, names in grouped.items()]
    for row in rows:
        reasons = sorted(set(row.get("reasons", {}).values()))
        notes += [f"{row['category']}: n/a because {reason}." for reason in reasons]
    return notes


def read_rows(paths: Sequence[str]) -> list[Row]:
    """Read the rows of result files."""
    rows: list[Row] = []
    for path in paths:
        try:
            rows += json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a results.json; eval.py writes them") from None
    return rows


def main(argv: Sequence[str] | None) -> int:
    """Print the Markdown table of the given result files, seeds merged."""
    parser = cli.Parser("Print the Markdown table of several results, seeds merged.")
    parser.add_argument("files", nargs="+", metavar="results.json")
    print(markdown_table(over_seeds(read_rows(parser.parse_args(argv).files))), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
