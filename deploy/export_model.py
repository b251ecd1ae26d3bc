"""Export a trained detector as static graphs, and prove that engines give the same scores."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils import cli, runtime
from utils.errors import UserError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.evaluator import Calibration
    from models.detector import Detector
    from utils.config import Config
    from utils.predictions import Output

SCORER_KEYS = ("score", "map_from", "peak_quantile", "blur_sigma")
IMAGES = 8  # real images to compare on


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "-cfg", "--config", help="accepted for compatibility; a run knows its own configuration"
    )
    parser.add_argument("-cat", "--category", help="default: the trained one")
    parser.add_argument("--exp_dir", default="exp", help="name below results/, or a path")
    parser.add_argument("--save_inference_dir", help="default: export.dir of the run")
    cli.add_checkpoint(parser)
    parser.add_argument("--data", help="images to compare on; default: those of the training")
    cli.add_flag(parser, "--onnx", "write model.onnx too, for ONNX Runtime and OpenVINO")
    parser.add_argument("--cpu_threads", type=cli.positive, default=1, help="to time engines with")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Export one category."""
    args = parse(argv)
    runtime.prepare()
    from deploy import onnx_export
    from deploy.bundle import publish, write_sidecar
    from engine import session
    from engine.evaluator import run

    if args.onnx:
        onnx_export.require_packages()
    runtime.use_device("cpu")
    name = session.chosen_category(args.exp_dir, args.category)
    found, detector, calibration = session.open_detector(args.exp_dir, name, args.checkpoint)
    if calibration is None:
        raise UserError(
            f"{found.folder}: no thresholds; finish the training (train.py --resume) or convert "
            "with --normals"
        )
    config = session.evaluation_config(found.config, args.o)
    images = real_images(config, args.data, found.meta["category"])
    expected = run(detector, images)
    target = Path(args.save_inference_dir or config.export.dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_graph(detector, folder)
        outputs = output_names(expected)
        if args.onnx:
            weights = [parameter.name for parameter in detector.backbone.parameters()]
            onnx_export.convert(folder, outputs, weights)
        about = describe(found, calibration, folder, outputs)
        write_sidecar(folder, about)
        about["engines"] = engines = try_engines(folder, images, expected, args.cpu_threads)
        if not engines["paddle"]["passed"]:
            reason = engines["paddle"]["reason"]
            raise UserError(
                f"{target}: Paddle Inference does not give the model's results: {reason}; nothing "
                "was written; please report this configuration"
            )
        about["parity"] = {
            "images": len(images),
            "score_max_difference": engines["paddle"]["max_score_difference"],
            "map_max_difference": engines["paddle"]["max_map_difference"],
        }
        write_sidecar(folder, about)
        publish(folder, target)
    print(f"inference model has been saved into {target}")
    return 0


def save_graph(detector: "Detector", folder: Path) -> None:
    """Fold what depends on parameters alone, and write graph and parameters for any batch size."""
    import paddle

    detector.eval()
    detector.fold()
    spec = paddle.static.InputSpec([None, 3, *detector.input_size], "float32", "image")
    static = paddle.jit.to_static(detector, input_spec=[spec], full_graph=True)
    paddle.jit.save(static, str(folder / "inference"))


def output_names(expected: "Output") -> list[str]:
    """Return the names of the graph's outputs, in order."""
    from deploy.bundle import NLL

    levels = range(len(expected.evidence))
    return ["anomaly_map", "score", NLL, *(f"evidence_{i}" for i in levels)]


def try_engines(
    folder: Path, images: np.ndarray, expected: "Output", threads: int
) -> dict[str, dict[str, Any]]:
    """Compare all engines with the trained model, and time them; print a line for each."""
    from deploy import parity
    from deploy.bundle import ONNX

    sample = folder.parent / f"{folder.name}.npz"
    parity.Sample(images, expected).save(sample)
    names = [
        name for name, options in parity.CANDIDATES.items()
        if options.engine == "paddle" or (folder / ONNX).is_file()
    ]  # fmt: skip
    print(f"exported against dynamic model on {len(images)} images, batch sizes 1 and 5:")
    engines = {}
    try:
        for name in names:
            engines[name] = entry = parity.check(name, folder, sample, threads)
            print(f"  {name}: {parity.summary(entry)}")
    finally:
        sample.unlink()
    return engines


def describe(
    found: "Checkpoint", calibration: "Calibration", folder: Path, outputs: list[str]
) -> dict[str, Any]:
    """Return the content of inference.yml."""
    from deploy.bundle import FORMAT, file_sha256

    model, meta = found.config.model, found.meta
    return {
        "format": FORMAT,
        "model": {
            "flow": model.flow, "backbone": model.backbone, "category": meta["category"],
            "preset": meta["preset"], "backbone_sha256": meta["backbone"]["sha256"],
            "checkpoint": found.folder.name, "epoch": meta["progress"]["epoch"],
            "seed": found.config.train.seed, "holdout": found.config.data.holdout,
        },
        "input": {
            "name": "image", "size": list(model.input_size), "resize": found.config.data.resize,
            "color": "RGB", "range": [0.0, 1.0],
        },
        "outputs": outputs,
        "scorer": {key: getattr(model, key) for key in SCORER_KEYS if hasattr(model, key)},
        "thresholds": {
            "image": calibration.image.to_dict(), "pixel": calibration.pixel.to_dict(),
        },
        "color_scale": list(calibration.color_scale),
        "nfa": calibration.acontrario.to_dict() if calibration.acontrario else None,
        "nll": calibration.nll.to_dict() if calibration.nll else None,
        "versions": runtime.versions(),
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }  # fmt: skip


def real_images(config: "Config", root: str | None, name: str) -> np.ndarray:
    """Return up to `IMAGES` images (B, 3, H, W), spread over test and training images."""
    from datasets.folder import find_category
    from engine.inputs import image_reader
    from utils.image import to_unit

    category = find_category(Path(root or config.data.root), name)
    records = [*category.test, *category.train]
    chosen = np.unique(np.linspace(0, len(records) - 1, IMAGES).round().astype(int))
    return to_unit(image_reader(records, config)(chosen)[0])


if __name__ == "__main__":
    cli.run(main)
