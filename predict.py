"""Find defects in images with a trained detector: scores, verdicts, maps and pictures."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from utils import cli, runtime


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "-cfg", "--config", help="accepted for compatibility; a run knows its own configuration"
    )
    parser.add_argument("--image_path", required=True, help="a file, a folder or a pattern")
    parser.add_argument("-cat", "--category", help="default: the trained one")
    parser.add_argument("--exp_dir", default="exp", help="name below results/, or a path")
    cli.add_checkpoint(parser)
    parser.add_argument("--image_threshold", type=float, help="default: the run's own")
    parser.add_argument("--pixel_threshold", type=float, help="default: the run's own")
    parser.add_argument("--output", help="default: predictions in the folder of the run")
    cli.add_high_precision(parser)
    cli.add_drift_window(parser)
    cli.add_flag(parser, "--save_maps", "write raw maps as .npy, in the geometry of the image")
    cli.add_flag(parser, "--gif", "write <category>.gif with up to 40 of the pictures")
    parser.add_argument(
        "--tile", metavar="N",
        help="cut images into tiles of N or HxW pixels, for a run trained on such images; the "
        "highest score of the tiles counts, their maps are blended",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, help="share of a tile that its neighbour covers; default: 0.25"
    )
    parser.add_argument("--batch_size", type=cli.positive, help="default: eval.batch_size")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Predict image by image; unreadable ones are counted and skipped unless there is just one."""
    args = parse(argv)
    runtime.prepare()
    from datasets.truth import KnownTruth
    from engine import session
    from engine.evaluator import run
    from utils.animate import write_gif
    from utils.config import assignments
    from utils.image import list_images
    from utils.predictions import (
        PhotoReader,
        PredictionWriter,
        chosen_output,
        chosen_threshold,
        console_line,
        say_drift,
        scale_around,
        watch_drift,
        whole_images,
    )
    from utils.tiling import Tiler, chosen_tiling
    from utils.visualize import safe_name

    tiling = chosen_tiling(args.tile, args.overlap)
    paths = list_images(args.image_path)
    runtime.use_device(args.device)
    name = session.chosen_category(args.exp_dir, args.category)
    found, detector, stored = session.open_detector(args.exp_dir, name, args.checkpoint)
    precision = assignments({"nfa.high_precision": args.high_precision})
    config = session.evaluation_config(found.config, [*args.o, *precision])
    stored = session.for_evaluation(stored, config)
    cuts = (stored.image, stored.pixel) if stored else (None, None)
    image = chosen_threshold(args.image_threshold, cuts[0], "--image_threshold")
    pixel = chosen_threshold(args.pixel_threshold, cuts[1], "--pixel_threshold")
    default = session.run_folder(args.exp_dir, name) / "predictions"
    output = chosen_output(Path(args.output) if args.output else default, paths)
    scale = stored.color_scale if stored else scale_around(pixel)
    test = stored.acontrario if stored else None
    writer = PredictionWriter(
        output, image, pixel, scale, acontrario=test, maps=args.save_maps,
        drift=watch_drift(stored.nll if stored else None, args),
    )  # fmt: skip
    print(f"image {image.describe()}")
    network = partial(run, detector, extract=detector.extractor(len(paths)))
    reader = PhotoReader(config.model.input_size, config.data.resize)
    batch_size = args.batch_size or config.eval.batch_size
    if tiling:
        print(tiling.caution(image), file=sys.stderr)
        results = Tiler(network, reader, tiling, batch_size, test).images(paths)
    else:
        results = whole_images(network, reader, paths, batch_size)
    pictures: list[Path] = []
    truths = KnownTruth()
    for photo, judged in results:
        label, truth = truths.of(photo.path)
        result = writer.add(photo, judged, truth=truth, label=label)
        pictures.append(output / result["picture"])
        print(console_line(result, alone=len(paths) == 1))
    writer.close()
    say_drift(writer.drift)
    if reader.skipped:
        print(reader.warning(), file=sys.stderr)
    if args.gif:
        gif = output / f"{safe_name(default.parent.name)}.gif"
        print(f"{write_gif(gif, pictures)} of {len(pictures)} pictures in {gif}")
    print(f"pictures and results.jsonl in {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
