"""Run an exported bundle on images: scores, verdicts, pictures, and a latency report."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils import cli, runtime

PRECISIONS = ("fp32", "fp16", "bf16")

if TYPE_CHECKING:
    from deploy.bundle import Bundle
    from deploy.engines import Engine


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "-cfg", "--config", help="accepted for compatibility; a bundle knows all it needs"
    )
    parser.add_argument("--image_path", default="images/bottle_bad.png", help="file, folder, glob")
    parser.add_argument("--save_inference_dir", default="deploy/inference", help="the bundle")
    parser.add_argument(
        "--engine", default="paddle",
        help="paddle, onnx, openvino, or auto: the fastest that passed its comparison at export",
    )  # fmt: skip
    cli.add_flag(parser, "--use_gpu", "run on the GPU")
    parser.add_argument("--gpu_id", type=int, default=0)
    parser.add_argument("--cpu_threads", type=cli.positive, default=1)
    cli.add_flag(parser, "--enable_mkldnn", "oneDNN kernels, if they pass a self-check first")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="below fp32, scores differ in the second or third digit: check the thresholds",
    )  # fmt: skip
    cli.add_flag(parser, "--use_tensorrt", "on NVIDIA GPUs; building its engine takes minutes")
    parser.add_argument("--batch_size", type=cli.positive, default=1)
    parser.add_argument("--max_batch_size", type=cli.positive, default=16, help="upper bound")
    parser.add_argument("--image_threshold", type=float, help="default: the bundle's own")
    parser.add_argument("--pixel_threshold", type=float, help="default: the bundle's own")
    parser.add_argument("--output", default="output", help="for results.jsonl and pictures")
    cli.add_drift_window(parser)
    cli.add_flag(parser, "--save_maps", "write raw maps as .npy, in the geometry of the image")
    cli.add_flag(parser, "--benchmark", "report latency by stage; writes no pictures")
    parser.add_argument("--warmup", type=int, default=0, help="batches left out of the report")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Predict image by image; unreadable ones are counted and skipped unless there is just one."""
    args = parse(argv)
    runtime.prepare()
    from deploy.benchmark import Stopwatch
    from deploy.bundle import read_bundle
    from deploy.choice import create_engine
    from deploy.engines import EngineOptions
    from utils.image import list_images
    from utils.predictions import (
        PhotoReader,
        PredictionWriter,
        chosen_output,
        chosen_threshold,
        console_line,
        say_drift,
        watch_drift,
    )

    paths = list_images(args.image_path)
    bundle = read_bundle(args.save_inference_dir)
    batch_size = min(args.batch_size, args.max_batch_size)
    options = EngineOptions(
        use_gpu=args.use_gpu, gpu_id=args.gpu_id, cpu_threads=args.cpu_threads,
        onednn=args.enable_mkldnn, engine=args.engine, precision=args.precision,
        tensorrt=args.use_tensorrt, max_batch_size=batch_size,
    )  # fmt: skip
    engine, note = create_engine(bundle, options)
    if note:
        print(note)
    image = chosen_threshold(args.image_threshold, bundle.image_threshold, "--image_threshold")
    pixel = chosen_threshold(args.pixel_threshold, bundle.pixel_threshold, "--pixel_threshold")
    print(f"image {image.describe()}")
    output = chosen_output(Path(args.output), paths)
    writer = PredictionWriter(
        output, image, pixel, bundle.color_scale, acontrario=bundle.acontrario,
        pictures=not args.benchmark, maps=args.save_maps, drift=watch_drift(bundle.nll, args),
    )  # fmt: skip
    reader = PhotoReader(bundle.input_size, bundle.resize)
    watch = Stopwatch(args.warmup)
    batches = reader.batches(paths, batch_size)
    while True:
        with watch.stage("preprocess_time"):
            photos = next(batches, None)
            if photos is None:
                break
            images = np.stack([photo.network_input for photo in photos])
        with watch.stage("inference_time"):
            found = engine.run(images)
        with watch.stage("postprocess_time"):
            results = [writer.add(photo, found.of(i)) for i, photo in enumerate(photos)]
        watch.batch_done(len(photos))
        for result in results:
            print(console_line(result, alone=len(paths) == 1))
    writer.close()
    say_drift(writer.drift)
    if reader.skipped:
        print(reader.warning(), file=sys.stderr)
    if args.benchmark:
        print(watch.report(_blocks(bundle, engine, batch_size)))
    print(f"results in {output}")
    return 0


def _blocks(bundle: "Bundle", engine: "Engine", batch_size: int) -> dict[str, dict[str, object]]:
    options = engine.options
    return {
        "Paddle info": {"paddle_version": runtime.versions().get("paddlepaddle", "n/a")},
        "Conf info": {
            "engine": f"{engine.name} ({engine.version()})",
            "runtime_device": f"gpu:{options.gpu_id}" if options.use_gpu else "cpu",
            "enable_mkldnn": options.onednn,
            "cpu_math_library_num_threads": options.cpu_threads,
            "enable_memory_optim": engine.name == "paddle",
            "enable_tensorrt": options.tensorrt,
        },
        "Model info": {
            "model_name": bundle.about["model"]["preset"],
            "precision": options.precision,
        },
        "Data info": {
            "batch_size": batch_size,
            "input_shape": "3,{},{}".format(*bundle.input_size),
        },
    }


if __name__ == "__main__":
    cli.run(main)
