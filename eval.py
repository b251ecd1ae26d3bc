"""Evaluate trained detectors on labelled test images."""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli, runtime
from utils.errors import UserError
from utils.files import atomic_write_text

if TYPE_CHECKING:
    from utils.html.evaluation import Chapter


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "-cfg", "--config", help="accepted for compatibility; a run knows its own configuration"
    )
    parser.add_argument(
        "-cat", "--category", "--categories", nargs="+", help="or all; default: the trained one"
    )
    parser.add_argument("--exp_dir", default="exp", help="name below results/, or a path")
    parser.add_argument("--data", help="folder of the categories; default: as in training")
    cli.add_checkpoint(parser)
    parser.add_argument("--norm", choices=("calibrated", "dataset", "batch"), help="CFLOW-AD only")
    cli.add_high_precision(parser)
    parser.add_argument("--eval-size", choices=("input", "256", "original"))
    cli.add_flag(parser, "--allow-missing-masks", "pixel metrics without unmasked images")
    cli.add_flag(parser, "--binned", "pixel metrics in bins: for sets whose maps fill the memory")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    cli.add_flag(parser, "--report", "also write report.html, all in one file")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    args = parser.parse_args(argv)
    if args.binned and args.report:
        parser.error("--report: shows maps, which --binned does not keep; leave one of both out")
    return args


def main(argv: Sequence[str] | None) -> int:
    """Evaluate one category or all, print tables, write results.json and the report."""
    args = parse(argv)
    runtime.prepare()
    from engine import session
    from utils.html.evaluation import evaluation_page
    from utils.report import console_table, markdown_table, seed_style_lines

    runtime.use_device(args.device)
    names = args.category or [session.chosen_category(args.exp_dir, None)]
    if "all" in names:
        names = session.trained_categories(args.exp_dir)
    if not names:
        raise UserError(
            f"{session.run_folder(args.exp_dir)}: no trained category here; train first"
        )
    rows: list[dict[str, Any]] = []
    chapters: list[Chapter] = []
    for name in names:
        row, chapter = evaluate_category(name, args, len(names))
        rows.append(row)
        chapters += [chapter] if chapter else []
        metrics = row["metrics"]
        print(
            f"EVAL:  image-auc : {_text(metrics['image_auroc'])} "
            f"pixel-auc:{_text(metrics['pixel_auroc'])}"
        )
    print(seed_style_lines(rows))
    print(console_table(rows))
    document = json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n"
    category = "" if "all" in (args.category or []) or len(names) > 1 else names[0]
    path = session.run_folder(args.exp_dir, category) / "results.json"
    atomic_write_text(path, document)
    print(f"results in {path}")
    if args.markdown:
        atomic_write_text(Path(args.markdown), markdown_table(rows))
    if args.report:
        page = evaluation_page(chapters, time.strftime("%Y-%m-%d %H:%M"))
        atomic_write_text(path.with_name("report.html"), page)
        print(f"report in {path.with_name('report.html')}")
    return 0


def evaluate_category(
    name: str, args: Namespace, of: int
) -> tuple[dict[str, Any], "Chapter | None"]:
    """Return the result row of one category of so many, and if wanted its part of the report."""
    from datasets.folder import find_category
    from engine import inputs, results, session
    from utils.config import assignments
    from utils.html.evaluation import PICTURES, picture_side

    flags = {
        "data.root": args.data, "eval.size": args.eval_size, "eval.norm": args.norm,
        "nfa.high_precision": args.high_precision,
    }  # fmt: skip
    found, detector, calibration = session.open_detector(args.exp_dir, name, args.checkpoint)
    config = session.evaluation_config(found.config, [*args.o, *assignments(flags)])
    category = find_category(Path(config.data.root), name, config.data.layout)
    print(f"[{name}] {category.describe()}")
    test = inputs.labelled_set(category.test, config, detector)
    if args.high_precision and config.nfa.method != "block":
        print(f"-hp: nfa.method is {config.nfa.method}, which rounds nothing; no effect")
    calibration = session.for_evaluation(calibration, config)
    started = time.perf_counter()
    evaluation = session.evaluate_test(
        detector, test, config, calibration, allow_missing_masks=args.allow_missing_masks,
        binned=args.binned,
    )  # fmt: skip
    cost = {
        "seconds": round(time.perf_counter() - started, 3), "memory_mb": runtime.peak_memory(),
    }  # fmt: skip
    for warning in evaluation.metrics.warnings:
        print(f"warning: {name}: {warning}")
    if config.eval.norm != "calibrated":
        calibration = None  # it is not of these scores
    row = results.result_row(name, found, config, calibration, test.records, evaluation, cost)
    if not args.report:
        return row, None
    chapter = results.chapter(
        row, found, calibration, test.records, evaluation, runtime.versions(),
        side=picture_side(of), budget=PICTURES // of,
    )  # fmt: skip
    return row, chapter


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"


if __name__ == "__main__":
    cli.run(main)
