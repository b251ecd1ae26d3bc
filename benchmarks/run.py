"""Measure ours and every installed competitor in turn, stage by stage, and write the page.

python -m benchmarks.run [--stage metrics nfa] [--quick] [--peers PYTHON]
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.page import PICTURE, render
from benchmarks.stages import STAGES, Side, Stage
from utils import cli, runtime
from utils.errors import UserError
from utils.files import atomic_write_text

REPO = Path(__file__).resolve().parent.parent
RESULTS, PAGE = REPO / "benchmarks/results", REPO / "docs/performance.md"
TRIAL = REPO / "results/benchmarks_quick"
Line = dict[str, Any]


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--stage", nargs="*", choices=tuple(STAGES), default=list(STAGES),
        help="none: only write the page anew",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=cli.positive, help="fresh processes of each; default: the stage's"
    )
    parser.add_argument("--peers", help="Python of the environment made by setup_peers.sh")
    parser.add_argument("--results", help="folder of the JSON files; default: benchmarks/results")
    parser.add_argument("--page", help="Markdown page to write; default: docs/performance.md")
    cli.add_flag(parser, "--quick", "one call of a small case each; default: into results/")
    args = parser.parse_args(argv)
    args.results = args.results or str(TRIAL if args.quick else RESULTS)
    args.page = args.page or str(TRIAL / "performance.md" if args.quick else PAGE)
    return args


def main(argv: Sequence[str] | None) -> int:
    """Measure the wanted stages, then write the page from all stored results."""
    args = parse(argv)
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.stage:
        result = measure(
            STAGES[name], args.rounds or STAGES[name].rounds, args.peers, quick=args.quick
        )
        atomic_write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_page(folder, Path(args.page))
    print(f"results in {folder}, page in {args.page}")
    return 0


def write_page(folder: Path, page: Path) -> None:
    """Write the page of all results in a folder, and its picture."""
    stored = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    if "growth" in stored:
        (page.parent / PICTURE).parent.mkdir(parents=True, exist_ok=True)
        rows = stored["growth"]["rows"]
        atomic_write_text(page.parent / PICTURE, growth.picture(growth.series_of(rows)))
    atomic_write_text(page, render(stored))


def measure(stage: Stage, rounds: int, peers: str | None, *, quick: bool) -> dict[str, Any]:
    """Return what is stored of a stage: machine, versions, and per case and threads all sides."""
    sides = [side for side in stage.sides if _installed(side, peers)]
    rows = []
    for case in (stage.quick,) if quick else stage.cases:
        if stage.prepare:
            _process(Side("prepare", stage.prepare), case, 1, 1, None)
        for threads in stage.threads[:1] if quick else stage.threads:
            wanted = [side for side in sides if case not in side.spared]
            times = (1, 1) if quick else (rounds, stage.calls)
            rows.append(_row(stage, wanted, case, threads, times, peers))
    return {
        "title": stage.title, "beside": stage.beside, "quick": quick, "rows": rows,
        "missing": [side.name for side in stage.sides if side not in sides],
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": runtime.versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip


def _row(
    stage: Stage,
    sides: list[Side],
    case: str,
    threads: int,
    times: tuple[int, int],
    peers: str | None,
) -> Line:
    rounds, calls = times
    lines: dict[str, list[Line]] = {side.name: [] for side in sides}
    for _ in range(rounds):  # A B A B …: what slows the machine down hits both
        for side in sides:
            line = run_side(side, case, threads, calls, peers)
            lines[side.name].append(line)
            print(f"{case}, {threads} threads, {side.name}: {line['seconds']:.4f} s", flush=True)
        check_equal(stage, {name: found[0]["values"] for name, found in lines.items()})
    return {
        "case": case, "threads": threads, "sides": {n: _summary(f) for n, f in lines.items()},
    }  # fmt: skip


def _summary(lines: list[Line]) -> Line:
    growth = [line["growth_mb"] for line in lines if line["growth_mb"] is not None]
    return {
        "seconds": statistics.median(line["seconds"] for line in lines),
        "all_seconds": [line["seconds"] for line in lines],
        "growth_mb": statistics.median(growth) if growth else None,
    }


def run_side(side: Side, case: str, threads: int, repeat: int, peers: str | None) -> Line:
    """Measure in a fresh process; raise UserError with its last words if it fails."""
    return json.loads(_process(side, case, threads, repeat, peers).strip().splitlines()[-1])


def _process(side: Side, case: str, threads: int, repeat: int, peers: str | None) -> str:
    python = str(peers) if side.environment == "peers" else sys.executable
    command = [
        python, "-m", side.module, "--side", side.name, "--case", case, "--threads", str(threads),
        "--repeat", str(repeat),
    ]  # fmt: skip
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, **limits}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{side.name}, {case}: stopped with {done.returncode}: {words[-1]}")
    return done.stdout


def check_equal(stage: Stage, values: Mapping[str, Mapping[str, float]]) -> None:
    """Raise UserError unless every side found what the first one did: the times mean nothing."""
    (own, expected), *others = values.items()
    for name, found in others:
        if not found:
            raise UserError(f"{name} reports no value to compare with {own}'s")
        for key, value in found.items():
            allowed = stage.tolerance(key)
            if not abs(expected[key] - value) <= allowed:
                raise UserError(
                    f"{key} is {expected[key]:.8g} by {own}, {value:.8g} by {name}: more than "
                    f"{allowed:g} apart, so times are not compared"
                )


def _installed(side: Side, peers: str | None) -> bool:
    if side.environment == "peers":
        return peers is not None
    return not side.needs or importlib.util.find_spec(side.needs) is not None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    cli.run(main)
