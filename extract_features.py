"""Extract the frozen features of a category once, to train from them without its images."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from utils import cli, runtime
from utils.config import Config, assignments, load, override
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.records import Category

BATCH_SIZE = 8  # of images; features do not depend on it


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("-cfg", "--config", default="configs/csflow_efficientnet_b5.yaml")
    parser.add_argument(
        "-cat", "--category", nargs="+",
        help="categories or all; default: the one that --data is, or bottle",
    )  # fmt: skip
    parser.add_argument("--data", help="folder of the categories, or of images of one of them")
    parser.add_argument("--output", default="data/features", help="gets a folder per category")
    parser.add_argument("--batch_size", type=cli.positive, default=BATCH_SIZE)
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    cli.add_flag(parser, "--allow-random-backbone", "go on without pretrained weights")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Extract every wanted category."""
    args = parse(argv)
    overrides = [*args.o, *assignments({"data.root": args.data}), "data.features=null"]
    config = load(args.config, overrides)
    runtime.prepare()
    from engine import inputs

    categories = inputs.find_trainable(config, args.category or [])
    configs = [override(config.for_category(each.name), overrides) for each in categories]
    for category in categories:
        if not category.train:
            raise UserError(f"{category.root}: no training images; put normal ones in train/good")
    runtime.use_device(args.device)
    for category, own in zip(categories, configs, strict=True):
        print(f"[{category.name}] {category.describe()}")
        for line in category.left_out:
            print(f"[{category.name}] left out: {line}")
        extract(own, category, args)
    features = quote(f"data.features={args.output}")
    print(f"next: python train.py -cfg {quote(args.config)} -o {features}")
    return 0


def extract(config: Config, category: "Category", args: Namespace) -> None:
    """Write the features of one category."""
    from datasets import extracted
    from datasets.records import UNKNOWN
    from engine import inputs, session
    from engine.batches import in_order

    if config.data.rotation:
        print(f"[{category.name}] data.rotation is left out: features cannot be turned")
    detector, backbone = session.new_detector(config, allow_random=args.allow_random_backbone)
    known = [record for record in category.test if record.label != UNKNOWN]
    train, test = (
        (records, inputs.extract_batches(
            detector, inputs.image_reader(records, config), in_order(len(records), args.batch_size)
        ))
        for records in ([*category.train, *category.holdout], known)
    )  # fmt: skip
    guard = inputs.feature_guard(config, backbone["sha256"])
    home = extracted.write(
        Path(args.output), category.name, guard, train, test, len(category.holdout)
    )
    size = sum(file.stat().st_size for file in home.iterdir())
    print(
        f"[{category.name}] {len(train[0])} training and {len(known)} test images: "
        f"{size / 1e6:.1f} MB in {home}"
    )


if __name__ == "__main__":
    cli.run(main)
