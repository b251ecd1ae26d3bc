"""The tutorial: it runs from top to bottom, and what is committed shows what it prints."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.small_run import REPO

NOTEBOOK = REPO / "docs/tutorial.ipynb"
RUNNER = REPO / "docs/run_tutorial.py"


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_tutorial", RUNNER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    before = NOTEBOOK.read_bytes()
    done = subprocess.run(
        [sys.executable, str(RUNNER), "--check"], capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert NOTEBOOK.read_bytes() == before


def test_outputs_are_kept_and_show_no_machine(runner) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert runner.faults_of(notebook, (str(Path.home()), "/tmp/")) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum(output.output_type == "error" for output in outputs) == 0
    pictures = [o for o in outputs if {"image/jpeg", "image/png"} & set(o.get("data", {}))]
    assert len(pictures) >= 10
    text = str(outputs)
    for words in ("EVAL:", "Anomaly - score:", "exported 0.", "Run successfully"):
        assert words in text


def test_every_heading_has_english_below_it() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    headed = [c.source for c in notebook.cells if c.source.startswith("#")]
    headed = [text for text in headed if not text.startswith("# ") or "FlowAD" in text]
    assert len(headed) >= 11
    for text in headed:
        english = text.split("\n\n")[1]
        assert english.startswith("*"), text


def test_a_failing_cell_and_a_path_of_the_machine_are_told(runner, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    target = tmp_path / runner.NOTEBOOK
    target.parent.mkdir()

    def written(source: str) -> bytes:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata.kernelspec = {
            "name": "python3",
            "display_name": "p",
            "language": "python",
        }
        nbformat.write(notebook, target)
        return target.read_bytes()

    before = written("1 / 0")
    assert runner.main([]) == 1
    assert target.read_bytes() == before
    before = written("import pathlib; print(pathlib.Path.home() / 'x')")
    assert runner.main([]) == 1
    assert target.read_bytes() == before
    written("import pathlib; print(pathlib.Path.cwd() / 'x')")
    assert runner.main([]) == 0
    (cell,) = nbformat.read(target, as_version=4).cells
    assert cell.outputs[0].text == "docs/x\n"
