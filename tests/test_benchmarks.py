"""The harness of the benchmarks: it measures, refuses unequal results, and writes the page."""

import json
from dataclasses import replace

import pytest

from benchmarks import growth, page, run
from benchmarks.stages import GROWTH, STAGES, Side, Stage
from utils.errors import UserError


@pytest.mark.slow
def test_a_quick_run_measures_both_sides_and_writes_the_page(tmp_path):
    target = tmp_path / "page.md"
    arguments = ["--stage", "nfa", "--quick", "--results", str(tmp_path), "--page", str(target)]
    assert run.main(arguments) == 0
    stored = json.loads((tmp_path / "nfa.json").read_text(encoding="utf-8"))
    (row,) = stored["rows"]
    assert list(row["sides"]) == [side.name for side in STAGES["nfa"].sides]
    assert all(side["seconds"] > 0 for side in row["sides"].values())
    assert "trial run" in target.read_text(encoding="utf-8")


def test_a_quick_run_leaves_the_published_figures_alone():
    quick, full = run.parse(["--quick"]), run.parse([])
    assert full.page.endswith("docs/performance.md")
    assert quick.page != full.page
    assert quick.results != full.results


def _stage(*sides: Side) -> Stage:
    return Stage("a stage", sides, ("big",), "small", 2.0, (("aupro", 0.1), ("", 1e-6)))


def test_sides_that_differ_are_not_compared():
    stage = _stage()
    run.check_equal(stage, {"ours": {"ap": 1.0, "aupro_0.3": 0.5}, "b": {"aupro_0.3": 0.55}})
    with pytest.raises(UserError, match=r"ap is 1 by ours, 1\.1 by b: more than 1e-06 apart"):
        run.check_equal(stage, {"ours": {"ap": 1.0}, "b": {"ap": 1.1}})
    with pytest.raises(UserError, match="more than"):
        run.check_equal(stage, {"ours": {"ap": 1.0}, "b": {"ap": float("nan")}})
    with pytest.raises(UserError, match="no value"):
        run.check_equal(stage, {"ours": {"ap": 1.0}, "b": {}})


def test_a_side_that_fails_is_named_with_its_last_words():
    side = Side("ours", "benchmarks.bench_nfa")
    with pytest.raises(UserError, match="ours, no such layout: stopped with 1: KeyError"):
        run.run_side(side, "no such layout", 1, 1, None)


def test_competitors_that_are_not_installed_are_left_out_and_named():
    sides = Side("a", "m", "peers"), Side("b", "m", needs="no_such_package_here")
    assert run.measure(Stage("t", sides, (), "", 1.0), 1, None, quick=False)["missing"] == [
        "a",
        "b",
    ]


def test_the_page_states_ratios_and_what_was_not_reached(monkeypatch):
    def side(seconds: float) -> dict:
        return {"seconds": seconds, "all_seconds": [seconds], "growth_mb": None}

    rows = [
        {
            "case": "c",
            "threads": 1,
            "sides": {"ours": side(1.0), "b": side(3.0), "d": side(1.5)},
        }
    ]
    result = {
        "title": "a stage", "beside": "memory, MB", "quick": False, "rows": rows, "missing": ["e"],
        "machine": {"processor": "P", "cores": 2}, "versions": {"numpy": "2"}, "date": "2026-01-01",
    }  # fmt: skip
    stage = replace(STAGES["nfa"], reach=2.0)
    monkeypatch.setitem(STAGES, "nfa", stage)
    text = page.render({"nfa": result})
    assert "| c | 1 | b | 3.00 | 2 | n/a, theirs n/a |" in text
    assert "| c | 1 | d | 1.50 | 2, **not reached** | n/a, theirs n/a |" in text
    assert "Not installed, so not measured: e." in text
    assert "trial run" not in text


def test_growth_is_told_by_its_exponent_and_drawn(tmp_path):
    """A time that grows with the square of a size, and one that grows in proportion."""
    powers = {"metrics, pixels": 2, "FastFlow step, batch": 1}
    rows = [
        {
            "case": f"{what} {size}",
            "threads": 1,
            "sides": {"ours": {"seconds": 1e-3 * size**power, "growth_mb": float(size)}},
        }
        for what, power in powers.items()
        for size in GROWTH[what]
    ]
    found = growth.series_of(rows)
    assert {each.what: round(each.exponent(), 6) for each in found} == {
        "metrics": 2, "FastFlow step": 1,
    }  # fmt: skip
    assert "| metrics | pixels | 64, 512 | 4.1, 262 | 64, 512 | 2.00 |" in growth.table(found)
    result = {
        "title": "growth", "beside": "", "quick": False, "rows": rows, "missing": [],
        "machine": {"processor": "P", "cores": 2}, "versions": {}, "date": "2026-01-01",
    }  # fmt: skip
    (tmp_path / "growth.json").write_text(json.dumps(result), encoding="utf-8")
    run.write_page(tmp_path, tmp_path / "page.md")
    assert "| FastFlow step | batch |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    picture = (tmp_path / page.PICTURE).read_text(encoding="utf-8")
    assert picture.startswith("<?xml")
    assert ">seconds<" in picture


def test_every_module_of_a_stage_is_there():
    for stage in STAGES.values():
        for side in stage.sides:
            assert (run.REPO / f"{side.module.replace('.', '/')}.py").is_file(), side.module
        assert stage.sides[0].name == "ours"
