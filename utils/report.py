"""Tables of results: console, Markdown, and means over categories and seeds.

`python -m utils.report compare RUN …` lays several runs side by side, as Markdown and HTML.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import cli
from utils.files import atomic_write_text
from utils.names import OBJECTS, TEXTURES
from utils.runs import Row, find_results, mean_row, named, over_seeds, read_rows

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
COST = (
    ("training epochs, s", "training_seconds"),
    ("training memory, MB", "training_memory_mb"),
    ("evaluation, s", "seconds"),
    ("evaluation memory, MB", "memory_mb"),
)
ORACLE = "* uses test labels (F1-max, oracle): not a threshold that can be deployed."


class Table(NamedTuple):
    """Hold the text of a table: its title, the columns' names, its rows and means below them."""

    title: str
    head: list[str]
    body: list[list[str]]
    means: list[list[str]]


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Add the mean over categories, and over textures and objects where all of them are there.

    Rows that name a `run` have means of their own for each run.
    """
    return [*rows, *_means(rows)]


def _means(rows: Sequence[Row]) -> list[Row]:
    by_run: dict[str | None, list[Row]] = {}
    for row in rows:
        by_run.setdefault(row.get("run"), []).append(row)
    means: list[Row] = []
    for own in by_run.values():
        by_name = {row["category"]: row for row in own}
        if not 1 < len(own) == len(by_name):  # several runs of one category have no common mean
            continue
        groups = {"mean": own}
        for title, names in (("mean textures", TEXTURES), ("mean objects", OBJECTS)):
            if all(name in by_name for name in names):
                groups[title] = [by_name[name] for name in names]
        means += [mean_row(title, group) for title, group in groups.items()]
    return means


def console_table(rows: Sequence[Row]) -> str:
    """Lay out rows with aligned columns; undefined values are `n/a`."""
    lines = []
    for title, head, body, means in tables(rows):
        table = [head, *body, *means]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [f"\n{title}:"] if title else []
        lines += ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in table]
    return "\n".join([*lines, *notes(rows)])


def markdown_table(rows: Sequence[Row], more: Sequence[Table] = ()) -> str:
    """Lay out rows as Markdown, with further tables, and with what they depend on below."""
    lines = []
    for title, head, body, means in [*tables(rows), *more]:
        lines += [f"{title}:", ""] if title else []
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += [*("| " + " | ".join(_escaped(cells)) + " |" for cells in [*body, *means]), ""]
    return "\n".join([*lines, *notes(rows)]) + "\n"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the first table, and the further ones where rows have their values."""
    means = _means(rows)
    found = [_table("", rows, means, COLUMNS)]
    for title, columns in FURTHER.items():
        own = [key for _, key in columns if key != "miou_oracle"]  # which every flow has
        parts = [
            [row for row in part if any(_is_known(row["metrics"].get(k)) for k in own)]
            for part in (rows, means)
        ]
        found += [_table(title, parts[0], parts[1], columns)] if any(parts) else []
    return found


def cost_table(rows: Sequence[Row]) -> list[Table]:
    """Return the table of time and memory; none if no row knows them."""
    known = [row for row in rows if any(_is_known(v) for v in row.get("cost", {}).values())]
    if not known:
        return []
    head = [*_first(known[0]), *(title for title, _ in COST)]
    body = [
        [*_first(row).values(), *(number(row["cost"], k, row.get("spread"), 0) for _, k in COST)]
        for row in known
    ]
    return [Table("Time and memory", head, body, [])]


def _table(title: str, rows: Sequence[Row], means: Sequence[Row], columns: Columns) -> Table:
    head = [*_first([*rows, *means][0]), *(name for name, _ in columns)]
    body, below = (
        [[*_first(row).values(), *_cells(row, columns)] for row in part] for part in (rows, means)
    )
    return Table(title, head, body, below)


def _first(row: Row) -> dict[str, str]:
    """Return what names a row, by the title of the column."""
    run = {"run": row["run"]} if row.get("run") else {}
    return {"category": row["category"], **run}


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def seed_style_lines(rows: Sequence[Row]) -> str:
    """Return FastFlow-Paddle's console lines, one per category and a mean."""
    lines = [
        f"{row['category']:15}  pixel auroc:{number(row['metrics'], 'pixel_auroc')}   "
        f"image auroc:{number(row['metrics'], 'image_auroc')}"
        for row in with_means(rows)
    ]
    return "\n".join(lines)


def _cells(row: Row, columns: Columns) -> list[str]:
    return [number(row["metrics"], key, row.get("spread")) for _, key in columns]


def number(
    values: Mapping[str, float | None], key: str, spread: Any = None, digits: int = 3
) -> str:
    """Return a figure and its standard deviation if there is one; `n/a` where it is undefined."""
    value = values.get(key)
    if value is None or math.isnan(value):
        return "n/a"
    deviation = (spread or {}).get(key)
    text = f"{value:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def notes(rows: Sequence[Row]) -> list[str]:
    """Return lines on what rows depend on and why figures are undefined."""
    lines = [ORACLE]
    grouped: dict[str, list[str]] = {}
    for row in rows:
        text = ", ".join(f"{k}: {v}" for k, v in row["settings"].items())
        text = f"{row['run']} — {text}" if row.get("run") else text
        grouped.setdefault(text, []).append(row["category"])
    lines += [f"{', '.join(names)} — {text}." for text, names in grouped.items()]
    for row in rows:
        reasons = sorted(set(row.get("reasons", {}).values()))
        lines += [f"{row['category']}: n/a because {reason}." for reason in reasons]
    return list(dict.fromkeys(lines))


def side_by_side(runs: Sequence[str]) -> list[Row]:
    """Return the rows of several runs, seeds merged; with more than one kind of run, named."""
    rows = named(over_seeds([row for run in runs for row in read_rows(find_results(run))]))
    if len({row["run"] for row in rows}) > 1:
        return rows
    return [{k: v for k, v in row.items() if k != "run"} for row in rows]


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser("Lay the results of several runs side by side, seeds merged.")
    parser.add_argument("command", choices=("compare",))
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="a folder with results.json of eval.py, its name below results/, or the file",
    )  # fmt: skip
    parser.add_argument("--markdown", metavar="FILE", help="default: print it")
    parser.add_argument("--html", metavar="FILE", help="also write a page with sortable tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Print the Markdown tables of several runs, or write them; write the page if wanted."""
    from utils.html.comparison import comparison_page

    args = parse(argv)
    rows = side_by_side(args.runs)
    text = markdown_table(rows, cost_table(rows))
    if args.html:
        atomic_write_text(Path(args.html), comparison_page(rows))
    if args.markdown:
        atomic_write_text(Path(args.markdown), text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
