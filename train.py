"""Train a detector on defect-free images, then fit its thresholds on held-out ones."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from utils import cli, runtime
from utils.config import Config, assignments, load, override
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.records import Category
    from engine.distributed import Team


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("-cfg", "--config", default="configs/resnet18.yaml")
    parser.add_argument(
        "-cat", "--category", nargs="+",
        help="categories or all; default: the one that --data is, or bottle",
    )  # fmt: skip
    parser.add_argument("--exp_dir", default="", help="name below results/, or a path")
    parser.add_argument("--data", help="folder of the categories, or of images of one of them")
    parser.add_argument("--epochs", type=cli.positive)
    parser.add_argument("--batch_size", type=cli.positive)
    parser.add_argument("--test_epochs", type=cli.positive, help="with --select-on test")
    parser.add_argument("--select-on", choices=("holdout", "test"), help="what `best` follows")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    cli.add_flag(parser, "--check", "only examine the data")
    cli.add_flag(parser, "--summary", "only print parameters, multiplications and memory by part")
    cli.add_flag(parser, "--resume", "go on with an interrupted run")
    cli.add_flag(parser, "--overwrite", "replace a run of the same name")
    cli.add_flag(parser, "--use_vdl", "write curves, example maps and latents for VisualDL")
    cli.add_flag(parser, "--use_tb", "the same for TensorBoard")
    parser.add_argument(
        "--show_epochs",
        type=cli.positive,
        default=5,
        help="for these two: show maps, latents and test metrics every so many epochs",
    )
    cli.add_flag(parser, "--allow-random-backbone", "go on without pretrained weights")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    args = parser.parse_args(argv)
    if args.resume and not args.exp_dir:
        parser.error("--resume needs --exp_dir, the run to go on with")
    return args


def main(argv: Sequence[str] | None) -> int:
    """Train every wanted category."""
    args = parse(argv)
    flags = {
        "data.root": args.data, "train.epochs": args.epochs, "train.batch_size": args.batch_size,
        "train.test_epochs": args.test_epochs, "train.select_on": args.select_on,
    }  # fmt: skip
    overrides = [*args.o, *assignments(flags)]
    config = load(args.config, overrides)
    runtime.prepare()
    if args.summary:
        for name in args.category or [""]:
            print_summary(override(config.for_category(name), overrides))
        return 0
    from datasets.check import check_category
    from engine import distributed, inputs, session
    from engine.curves import chosen_boards

    categories = inputs.find_trainable(config, args.category or [])
    configs = [override(config.for_category(c.name), overrides) for c in categories]
    if args.check:
        if config.data.features:
            raise UserError("--check: examines images; leave data.features out")
        sizes = [each.model.input_size for each in configs]
        reports = [check_category(c, size) for c, size in zip(categories, sizes, strict=True)]
        print("\n\n".join(report.render() for report in reports))
        return 0 if all(report.ok for report in reports) else 1
    device = runtime.use_device(args.device)
    if device == "cpu" and any(each.train.amp for each in configs):
        raise UserError("train.amp: half precision needs a GPU; set -o train.amp=false")
    chosen_boards(vars(args))
    team = distributed.join(device)
    if team.size > 1 and not args.exp_dir:
        raise UserError("--exp_dir: several processes need it, the run that all of them work on")
    exp_dir = args.exp_dir or session.next_exp_dir(config.train.batch_size)
    print(f"device: {device}" + (f", process {team.rank + 1} of {team.size}" * (team.size > 1)))
    for category, own in zip(categories, configs, strict=True):
        train_category(own, category, exp_dir, args, team)
    return 0


def print_summary(config: Config) -> None:
    """Print what a detector of this configuration takes; no weights or images are needed."""
    from engine import session
    from models.summary import render, summarise

    runtime.use_device("cpu")
    summary = summarise(session.build_from(config))
    print(render(summary, asdict(config.model)))


def train_category(
    config: Config, category: "Category", exp_dir: str, args: Namespace, team: "Team"
) -> None:
    """Train one category and store its thresholds."""
    from engine import checkpoint, inputs, session
    from engine.curves import chosen_boards
    from engine.log import RunLog, SilentLog
    from engine.trainer import Trainer

    folder = session.run_folder(exp_dir, category.name)
    going_on = checkpoint.goes_on(folder, config, resume=args.resume, overwrite=args.overwrite)
    detector, backbone = session.new_detector(config, allow_random=args.allow_random_backbone)
    data = inputs.training_inputs(config, category, detector, backbone["sha256"])
    judge = session.test_judge(detector, data.test, config)
    team.check_same("training images or backbone weights", data.digest)
    if not going_on and team.leads:  # only now that nothing refuses the new run any more
        checkpoint.remove_run(folder)
    boards = chosen_boards(vars(args))
    log = RunLog(folder, boards) if team.leads else SilentLog()
    if not config.data.features:
        log.say(f"[{category.name}] {category.describe()}")
    own = " (the data set's validation images)" if data.validation else ""
    log.say(
        f"[{category.name}] {data.train} images to train on, {data.holdout} held out{own}, "
        f"{len(data.test.records)} to test; run in {folder}"
    )
    meta = {
        "category": category.name, "preset": Path(args.config).stem, "backbone": backbone,
        "data": {"train": data.train, "holdout": data.holdout, "digest": data.digest},
        "versions": runtime.versions(),
    }  # fmt: skip
    objectives = session.training_objectives(detector, config)
    trainer = Trainer(
        detector, config, folder, log, label=category.name, meta=meta, objectives=objectives,
        team=team,
    )  # fmt: skip
    if going_on and trainer.resume():
        log.say(f"[{category.name}] resumed after epoch {trainer.progress.epoch}")
    started = time.perf_counter()
    with team.in_turn():  # the first one writes the feature cache
        train, holdout = data.sources(detector)
    log.say(f"[{category.name}] features ready after {time.perf_counter() - started:.1f} s")
    every = args.show_epochs
    watch = session.test_watcher(detector, data.test, config, log, every) if boards else None
    trainer.fit(train, holdout, judge, watch)
    if not team.leads:
        return
    fitted = {
        name: session.calibrate_checkpoint(folder / name, detector, holdout, train, config)
        for name in checkpoint.names(folder)
    }
    log.say(f"[{category.name}] image {fitted['best'].image.describe()}")
    log.say(f"[{category.name}] pixel {fitted['best'].pixel.describe()}")
    memory = runtime.peak_memory()
    log.event("done", trainer.progress.epoch, memory_mb=memory)
    log.say(
        f"[{category.name}] done after epoch {trainer.progress.epoch} (best: "
        f"{trainer.progress.best_epoch}) and {time.perf_counter() - started:.0f} s"
        + (f", at most {memory} MB of memory" if memory else "")
        + f"; next: python {_next_command(config, category, exp_dir)}"
    )
    log.close()


def _next_command(config: Config, category: "Category", exp_dir: str) -> str:
    run = f"--exp_dir {quote(exp_dir)} -cat {quote(category.name)}"
    if category.test:
        return f"eval.py {run} --data {quote(config.data.root)}"
    return f"predict.py {run} --image_path IMAGES"


if __name__ == "__main__":
    cli.run(main)
