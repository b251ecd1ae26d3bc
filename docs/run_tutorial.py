"""Run the tutorial from top to bottom in a copy of the project: python docs/run_tutorial.py."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path("docs/tutorial.ipynb")
# The notebook needs none of these; some are large, some the user's own.
LEFT_OUT = (".*", "__pycache__", "results", "data", "output", "tests", "inference")
CELL_SECONDS = 600
MOST_BYTES = 1_500_000
# What a reader must not see: warnings that nobody can act on, and traces of one machine.
UNWANTED = ("ccache", "Traceback", "UserWarning", "\x1b")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only run it, and keep nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebook and keep its outputs, unless a cell fails or shows what it must not."""
    args = parse(argv)
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "FlowAD"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        try:
            run(notebook, copy)
        except CellExecutionError as error:
            print(f"{NOTEBOOK}: {error}", file=sys.stderr)
            return 1
        make_relative(notebook, f"{copy}{os.sep}")
        faults = faults_of(notebook, (str(copy), folder, str(ROOT), str(Path.home()) + os.sep))
    for fault in faults:
        print(f"{NOTEBOOK}: {fault}", file=sys.stderr)
    if faults:
        return 1
    if not args.check:
        nbformat.write(notebook, ROOT / NOTEBOOK)
    return 0


def run(notebook: NotebookNode, root: Path) -> None:
    """Execute every cell of a notebook in a checkout, and say how long each took."""
    os.environ["IPYTHONDIR"] = str(root.parent / "ipython")
    started = time.perf_counter()

    def executed(cell: NotebookNode, cell_index: int, **_: object) -> None:
        cell.metadata.pop("execution", None)  # times of day
        first = cell.source.partition("\n")[0]
        print(f"{time.perf_counter() - started:6.1f} s  {cell_index:3}  {first}", flush=True)

    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, coalesce_streams=True, on_cell_executed=executed,
        resources={"metadata": {"path": str((root / NOTEBOOK).parent)}},
    )  # fmt: skip
    client.execute()


def make_relative(notebook: NotebookNode, root: str) -> None:
    """Shorten paths below `root` in printed text: a reader's folder is another one."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = output["text"].replace(root, "")


def faults_of(notebook: NotebookNode, machine: Sequence[str]) -> list[str]:
    """Return what the outputs of a notebook must not show; `machine` are paths of this one."""
    faults = []
    for index, cell in enumerate(notebook.cells):
        text = str(cell.get("outputs", ""))
        found = [word for word in (*UNWANTED, *machine) if word in text]
        faults += [f"cell {index} shows {word!r}" for word in found]
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_BYTES:
        faults.append(f"{size} bytes; at most {MOST_BYTES}: show fewer or smaller pictures")
    return faults


if __name__ == "__main__":
    sys.exit(main())
