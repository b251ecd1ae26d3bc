"""Tables of results: undefined values, means, several seeds."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metrics.suite import evaluate
from utils import report
from utils.errors import UserError

KEYS = [key for _, key in report.COLUMNS]


def row(category: str = "bottle", seed: int = 0, value: float = 0.5, **changes: Any) -> dict:
    settings = {"preset": "p", "checkpoint": "last", "epoch": 3, "seed": seed, "runs": 1}
    metrics = dict.fromkeys(KEYS, value)
    return {
        "category": category,
        "settings": {**settings, **changes.pop("settings", {})},
        "metrics": {**metrics, **changes.pop("metrics", {})},
        "reasons": {},
        **changes,
    }


def cells(table: str, category: str) -> list[str]:
    (line,) = [x for x in table.splitlines() if x.startswith(f"| {category} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_column_exists_among_the_metrics():
    values = evaluate([0.1, 0.9], [0, 1], image_threshold=0.5).values
    assert set(KEYS) <= set(values)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_undefined_is_never_a_number(value):
    broken = row(metrics={"pixel_auroc": value}, reasons={"pixel_auroc": "no masks at all"})
    for table in (report.markdown_table([broken]), report.console_table([broken])):
        assert "n/a" in table
        assert "0.000" not in table
        assert "nan" not in table.lower().replace("n/a", "")
        assert "bottle: n/a because no masks at all." in table
    assert cells(report.markdown_table([broken]), "bottle")[2] == "n/a"
    assert "pixel auroc:n/a   image auroc:0.500" in report.seed_style_lines([broken])


def test_a_mean_over_an_undefined_value_is_undefined():
    rows = [row("wood", value=0.25), row("tile", metrics={"pixel_auroc": None}, value=0.75)]
    mean = cells(report.markdown_table(rows), "mean")
    assert mean[1] == "0.500"
    assert mean[2] == "n/a"


def test_the_seeds_console_form():
    """`{category:15}  pixel auroc:0.xxx   image auroc:0.xxx` and a mean row (evaluation.md §5)."""
    rows = [
        row("metal_nut", metrics={"pixel_auroc": 0.1234, "image_auroc": 0.9996}),
        row("wood", metrics={"pixel_auroc": 0.3, "image_auroc": 1.0}),
    ]
    assert report.seed_style_lines(rows).splitlines() == [
        "metal_nut        pixel auroc:0.123   image auroc:1.000",
        "wood             pixel auroc:0.300   image auroc:1.000",
        "mean             pixel auroc:0.212   image auroc:1.000",
    ]


def test_means_of_textures_and_objects():
    rows = [row(name, value=0.1 * i) for i, name in enumerate(report.TEXTURES)]
    names = [r["category"] for r in report.with_means(rows)]
    assert names == [*report.TEXTURES, "mean", "mean textures"]
    rows += [row(name, value=0.9) for name in report.OBJECTS]
    means = {r["category"]: r["metrics"]["miou"] for r in report.with_means(rows)[15:]}
    assert means["mean textures"] == pytest.approx(0.2)
    assert means["mean objects"] == pytest.approx(0.9)
    assert means["mean"] == pytest.approx((5 * 0.2 + 10 * 0.9) / 15)


def test_a_single_row_and_runs_of_one_category_have_no_mean():
    assert report.with_means([row()]) == [row()]
    best_and_last = [row(), row(settings={"checkpoint": "best"})]
    assert report.with_means(best_and_last) == best_and_last


def test_every_table_says_what_its_rows_depend_on():
    rows = [row("wood"), row("tile"), row("grid", settings={"checkpoint": "best on test"})]
    for table in (report.markdown_table(rows), report.console_table(rows)):
        assert "wood, tile — preset: p, checkpoint: last, epoch: 3, seed: 0, runs: 1." in table
        assert "grid — preset: p, checkpoint: best on test" in table
        assert report.ORACLE in table


def test_markdown_has_as_many_cells_in_every_line():
    lines = report.markdown_table([row("wood"), row("tile")]).splitlines()[:5]
    assert {line.count("|") for line in lines} == {len(report.COLUMNS) + 2}


def test_seeds_are_merged():
    values = [0.5, 0.7, 0.9]
    rows = [row(seed=s, value=v, settings={"epoch": 10 + s}) for s, v in enumerate(values)]
    (merged,) = report.over_seeds(rows)
    assert merged["metrics"]["miou"] == pytest.approx(0.7)
    assert merged["spread"]["miou"] == pytest.approx(statistics.stdev(values))
    assert merged["settings"]["seed"] == "0, 1, 2"
    assert merged["settings"]["runs"] == 3
    assert merged["settings"]["epoch"] == "10, 11, 12"
    assert cells(report.markdown_table([merged]), "bottle")[1] == "0.700 ± 0.200"


def test_only_seeds_are_merged():
    rows = [row(seed=0), row(seed=1, settings={"preset": "q"}), row("wood", seed=1)]
    assert report.over_seeds(rows) == rows
    with pytest.raises(UserError, match=r"two results of one seed \(\[0, 0\]\)"):
        report.over_seeds([row(), row(value=0.6)])


def test_an_undefined_value_in_one_seed_is_undefined_in_the_mean():
    (merged,) = report.over_seeds([row(seed=0), row(seed=1, metrics={"miou": None})])
    assert merged["metrics"]["miou"] is None
    assert cells(report.markdown_table([merged]), "bottle")[-3] == "n/a"


def written(folder: Path, *rows: dict) -> str:
    """Write a results.json as eval.py does; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    return str(folder)


def test_compare(tmp_path, capsys):
    """Seeds merged by file and by folder; the same table as that of one run."""
    runs = [written(tmp_path / str(s), row(seed=s, value=0.5 + s / 10)) for s in (0, 1)]
    assert report.main(["compare", runs[0], f"{runs[1]}/results.json"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "bottle")[:2] == ["bottle", "0.550 ± 0.071"]
    assert "Time and memory" not in out  # these rows know nothing of it
    assert "| run |" not in out


def test_compare_writes_markdown_and_a_page(tmp_path, capsys):
    runs = [
        written(tmp_path / name, row(settings={"preset": name}, cost={"seconds": 12.25}))
        for name in ("csflow", "uflow")
    ]
    files = [tmp_path / "deep/a.md", tmp_path / "deep/a.html"]
    options = ["--markdown", str(files[0]), "--html", str(files[1])]
    assert report.main(["compare", *runs, *options]) == 0
    assert capsys.readouterr().out == ""
    text, page = (file.read_text(encoding="utf-8") for file in files)
    head, _, one, two = text.splitlines()[:4]
    assert head.startswith("| category | run | image AUROC |")
    assert one.startswith("| bottle | csflow | 0.500 |")
    assert two.startswith("| bottle | uflow | 0.500 |")
    assert "| bottle | csflow | n/a | n/a | 12 | n/a |" in text
    assert page.startswith("<!DOCTYPE html>")
    assert "<h1>Comparison: 2 runs</h1>" in page
    assert '<td class="text">uflow</td><td>0.500</td>' in page
    assert '<table class="sortable">' in page


def test_every_run_has_its_own_means(tmp_path):
    """And over the same seeds of all categories the deviation of the means, not of the rows."""
    runs = [
        written(
            tmp_path / f"{preset}{seed}",
            row("wood", seed, 0.5 + seed / 10, settings={"preset": preset}),
            row("tile", seed, 0.9 - seed / 10, settings={"preset": preset}),
        )
        for preset in ("a", "b")
        for seed in (0, 1)
    ]
    lines = report.markdown_table(report.side_by_side(runs[:3])).splitlines()
    assert [line.split(" | ")[:3] for line in lines if line.startswith("| mean ")] == [
        ["| mean", "a", "0.700 ± 0.000"],
        ["| mean", "b", "0.700"],
    ]


def test_a_bar_in_a_name_stays_in_its_cell(tmp_path):
    table = report.markdown_table([row("a|b")])
    assert "| a\\|b | 0.500 |" in table


@pytest.mark.parametrize("text", ["{", "[]", '{"rows_": []}', "3"])
def test_a_file_that_is_no_result(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not a results\.json"):
        report.read_rows([str(file)])
    with pytest.raises(UserError, match=r"x\.json: not a results\.json"):
        report.main(["compare", str(file)])
    for wrong in ([], ["compare"], [str(file)]):
        with pytest.raises(SystemExit):
            report.main(wrong)


# --- tables below the first


def test_further_tables_appear_with_their_values():
    nfa = {"miou_nfa": 0.25, "miou_nfa_oracle": 0.375, "nfa_false_alarm_rate": 0.125}
    plain, full = row(), row("wood", metrics={**nfa, "youden_threshold": 1.5})
    for table in (report.markdown_table([plain]), report.console_table([plain])):
        assert "NFA" not in table
        assert "Youden" not in table
    table = report.markdown_table([full])
    lines = [line for line in table.splitlines() if line.startswith("| wood |")]
    assert lines[1] == "| wood | 1.500 | n/a | n/a | n/a | n/a |"
    assert lines[2] == "| wood | 0.250 | 0.375 | 0.125 | n/a |"
    assert "oracles, not for deployment" in table
    both = report.markdown_table([plain, full])
    assert both.count("| bottle |") == 1  # it has no such values
    assert "mIoU @ log NFA = 0" in report.console_table([full])


def test_every_further_column_exists_among_the_metrics():
    values = evaluate([0.1, 0.9], [0, 1], nfa_maps=[np.zeros((2, 2))] * 2).values
    assert {key for columns in report.FURTHER.values() for _, key in columns} <= set(values)


def test_false_alarms_are_shown_without_masks():
    """Of old files, of a flow without NFA, and of a test set without ground truth."""
    missing = {"miou_nfa": None, "miou_nfa_oracle": float("nan"), "nfa_false_alarm_rate": 0.125}
    old, plain = row("grid"), row("wood", metrics={"miou_oracle": 0.5, "youden_threshold": None})
    table = report.markdown_table([old, plain])
    assert "log NFA" not in table
    assert "Youden" not in table
    table = report.markdown_table([old, plain, row(metrics=missing)])
    assert "| bottle | n/a | n/a | 0.125 | n/a |" in table
    assert table.count("| wood |") == 1


def test_further_tables_have_means():
    rows = [row(name, metrics={"youden_threshold": t}) for name, t in (("wood", 1), ("tile", 2))]
    assert "| mean | 1.500 | n/a | n/a | n/a | n/a |" in report.markdown_table(rows)


def test_further_tables_over_seeds():
    rows = [row(seed=s, metrics={"miou_nfa": v}) for s, v in ((0, 0.25), (1, 0.75))]
    table = report.markdown_table(report.over_seeds(rows))
    assert "| bottle | 0.500 ± 0.354 | n/a | n/a | n/a |" in table
