"""Results of several runs: found on disk, merged over seeds, named by what tells them apart."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from utils.errors import UserError

Row = Mapping[str, Any]  # of results.json, as eval.py writes it
RESULTS = Path("results")
SEED = "train.seed"
# What a figure does not depend on: where things are, how they are read, how often one looks.
_PLACES = (
    "data.root", "data.layout", "data.workers", "data.cache", "data.cache_dir", "data.features",
    "model.weights", "train.log_every", "train.test_epochs", "eval.batch_size", "export.dir",
    "per_category", SEED,
)  # fmt: skip


def find_results(run: str) -> list[Path]:
    """Return the result files of a run: a file itself, a folder, or a name below results/.

    Of a folder, its own results.json, or else those of the categories in it.
    """
    given = Path(run)
    if given.is_file():
        return [given]
    folder = given if given.is_dir() else RESULTS / run
    own = folder / "results.json"
    found = [own] if own.is_file() else sorted(folder.glob("*/results.json"))
    if not found:
        raise UserError(f"{run}: no results.json there or in {folder}; run eval.py first")
    return found


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """Read the rows of result files."""
    rows: list[Row] = []
    for path in paths:
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
            rows += [row for row in read if row["category"] and row["settings"] and row["metrics"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a results.json; eval.py writes them") from None
    return rows


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that differ in the seed only: mean and sample standard deviation."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row["category"], what(row)], sort_keys=True)
        groups.setdefault(key, []).append(row)
    return [_merged(group) for group in groups.values()]


def what(row: Row) -> dict[str, Any]:
    """Return all settings of a row by name on which its figures depend, but for the seed."""
    own = {k: v for k, v in row["settings"].items() if k not in ("seed", "epoch", "runs")}
    config = {f"{s}.{k}": v for s, part in row.get("config", {}).items() for k, v in part.items()}
    return own | {k: v for k, v in config.items() if k not in _PLACES and "per_category" not in k}


def named(rows: Sequence[Row]) -> list[Row]:
    """Give each row a `run`: its preset, or else the settings that tell rows of a category apart.

    Rows come out by category, in the order in which runs and categories came first.
    """
    telling: list[str] = []
    for key in {key: None for row in rows for key in what(row)}:
        if _tells_more(rows, telling, key):
            telling.append(key)
    texts = [
        ", ".join(_text(key, what(row).get(key)) for key in telling or ["preset"]) for row in rows
    ]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    order = list(dict.fromkeys(texts))
    both = [{**row, "run": text} for row, text in zip(rows, texts, strict=True)]
    return sorted(both, key=lambda r: (categories.index(r["category"]), order.index(r["run"])))


def mean_row(title: str, rows: Sequence[Row]) -> Row:
    """Return the mean of rows of one run; over the same seeds, the deviation of their means too."""
    own = {"category": title, "run": rows[0].get("run"), "metrics": _mean(rows)}
    seeds = [set(row.get("by_seed", ())) for row in rows]
    if not seeds[0] or any(each != seeds[0] for each in seeds):
        return own
    means = [{"metrics": _mean([row["by_seed"][s] for row in rows])} for s in sorted(seeds[0])]
    return {**own, "spread": _deviation(means, "metrics")}


def _mean(rows: Sequence[Row], part: str = "metrics") -> dict[str, float | None]:
    """Return the mean of every figure; None where it is undefined in one of the rows."""
    means: dict[str, float | None] = {}
    for key in rows[0].get(part, {}):
        values = [row.get(part, {}).get(key) for row in rows]
        means[key] = None if any(v is None for v in values) else fmean(values)
    return means


def _merged(group: list[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    seeds = sorted(row["settings"]["seed"] for row in group)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{group[0]['category']}: two results of one seed ({seeds}); give one each")
    settings = {**group[0]["settings"], "seed": ", ".join(map(str, seeds)), "runs": len(group)}
    settings["epoch"] = ", ".join(str(row["settings"]["epoch"]) for row in group)
    return {
        **group[0],
        "metrics": _mean(group),
        "cost": _mean(group, "cost"),
        "spread": {**_deviation(group, "metrics"), **_deviation(group, "cost")},
        "settings": settings,
        "by_seed": {row["settings"]["seed"]: {"metrics": row["metrics"]} for row in group},
    }


def _deviation(group: Sequence[Row], part: str) -> dict[str, float | None]:
    """Return the sample standard deviation of every figure; None where one is undefined."""
    spread = {}
    for key in group[0].get(part, {}):
        known = [v for row in group if (v := row.get(part, {}).get(key)) is not None]
        spread[key] = stdev(known) if len(known) == len(group) else None
    return spread


def _tells_more(rows: Sequence[Row], telling: Sequence[str], key: str) -> bool:
    """Tell whether rows of one category that are alike so far differ in `key`."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        values = what(row)
        alike = json.dumps([row["category"], *(values.get(k) for k in telling)])
        seen.setdefault(alike, set()).add(json.dumps(values.get(key)))
    return any(len(values) > 1 for values in seen.values())


def _text(key: str, value: Any) -> str:
    if key in ("preset", "backbone", "checkpoint"):
        return str(value)
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
