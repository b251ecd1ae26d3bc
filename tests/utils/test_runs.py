"""Results of several runs: where they are found, and by what runs are told apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from utils import runs
from utils.errors import UserError


def row(category: str = "bottle", seed: int = 0, value: float | None = 0.5, **changes: Any) -> dict:
    settings = {"preset": "p", "backbone": "b", "epoch": 3, "seed": seed, "runs": 1}
    config: dict[str, dict] = {
        "model": {"steps": 8}, "data": {"root": "data"},
        "train": {"lr": 0.1, "seed": seed, "epochs": 3}, "per_category": {"bottle": {}},
    }  # fmt: skip
    for name, part in changes.pop("config", {}).items():
        config[name] = {**config[name], **part}
    return {
        "category": category,
        "settings": {**settings, **changes},
        "metrics": {"image_auroc": value},
        "cost": {"seconds": 2.0 + seed},
        "config": config,
    }


def names(*rows: dict) -> list[str]:
    return [each["run"] for each in runs.named(rows)]


def test_results_are_found_in_files_folders_and_below_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("exp/wood", "exp/tile", "all", "all/wood"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "results.json").touch()
    own, wood, tile = (
        Path("results") / n / "results.json" for n in ("all", "exp/wood", "exp/tile")
    )
    assert runs.find_results("exp") == runs.find_results("results/exp") == [tile, wood]
    assert runs.find_results("exp/wood") == runs.find_results(str(wood)) == [wood]
    assert runs.find_results("all") == [own]
    (tmp_path / "results/empty").mkdir()
    for missing in ("empty", "nothing"):
        with pytest.raises(UserError, match=rf"{missing}: no results\.json .*run eval\.py first"):
            runs.find_results(missing)


def test_runs_are_named_by_what_tells_them_apart():
    assert names(row(), row("wood")) == ["p", "p"]
    assert names(row(preset="a"), row(preset="b")) == ["a", "b"]
    assert names(row(backbone="x"), row(backbone="y")) == ["x", "y"]
    faster = row(config={"train": {"lr": 0.2}})
    assert names(row(), faster) == ["train.lr=0.1", "train.lr=0.2"]
    assert names(row(), row(preset="q"), faster) == [
        "p, train.lr=0.1", "q, train.lr=0.1", "p, train.lr=0.2",
    ]  # fmt: skip


def test_what_differs_between_categories_only_tells_nothing_apart():
    """CFLOW-AD's presets have an input size for each category."""
    assert names(row(), row("wood", config={"model": {"steps": 4}})) == ["p", "p"]


def test_rows_come_by_category():
    both = [row("wood", preset="b"), row("tile", preset="b"), row("tile", preset="a"), row("wood")]
    found = [(each["category"], each["run"]) for each in runs.named(both)]
    assert found == [("wood", "b"), ("wood", "p"), ("tile", "b"), ("tile", "a")]


def test_only_equal_settings_are_seeds_of_one_run():
    same = [row(seed=0), row(seed=1, config={"data": {"root": "elsewhere"}})]
    (merged,) = runs.over_seeds(same)
    assert merged["cost"] == {"seconds": 2.5}
    assert merged["spread"]["seconds"] == pytest.approx(0.5**0.5)
    other = row(seed=1, config={"train": {"lr": 0.2}})
    assert len(runs.over_seeds([row(seed=0), other])) == 2


def test_means_over_categories_have_a_deviation_where_the_seeds_are_the_same():
    rows = [row(c, s, v + s * d) for c, v, d in (("a", 0.2, 0.1), ("b", 0.4, 0.3)) for s in (0, 1)]
    merged = runs.over_seeds(rows)
    found = runs.mean_row("mean", merged)
    assert found["metrics"]["image_auroc"] == pytest.approx(0.4)
    assert found["spread"]["image_auroc"] == pytest.approx(0.2 / 2**0.5)
    assert "spread" not in runs.mean_row("mean", [merged[0], row("b")])
    assert "spread" not in runs.mean_row("mean", [row("a"), row("b")])
    broken = runs.over_seeds([*rows[:3], row("b", 1, None)])
    assert runs.mean_row("mean", broken)["metrics"]["image_auroc"] is None
    assert runs.mean_row("mean", broken)["spread"]["image_auroc"] is None


def test_rows_of_earlier_versions_can_be_compared():
    old = {key: value for key, value in row().items() if key not in ("config", "cost")}
    assert runs.over_seeds([old])[0]["metrics"] == {"image_auroc": 0.5}
    merged = runs.over_seeds([old, {**old, "settings": {**old["settings"], "seed": 1}}])
    assert merged[0]["spread"]["image_auroc"] == 0
    assert names(old) == ["p"]


@pytest.mark.parametrize("content", [{"rows": [{}]}, {"rows": [{"category": "x"}]}, {"rows": 3}])
def test_files_with_something_else_are_refused(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a results"):
        runs.read_rows([file])
