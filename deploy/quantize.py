"""Quantize the backbone of an exported bundle to 8-bit integers, calibrated on normal images.

The flow stays float32: its exponentials would turn the rounding of integers into wrong likelihoods.
"""

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils import cli, runtime
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.records import Record
    from deploy.bundle import Bundle
    from deploy.engines import Engine
    from engine.evaluator import Calibration
    from utils.predictions import Output

MOST_NORMALS = 128  # to calibrate the ranges of activations on
FEWEST_NORMALS = 8
TIMED_RUNS = 25
OPERATORS = ("Conv", "MatMul", "Gemm")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--save_inference_dir", default="deploy/inference", help="the bundle")
    parser.add_argument("--output", default="deploy/inference_int8", help="the new bundle")
    parser.add_argument("--data", required=True, help="the images that the model was trained on")
    parser.add_argument("-cat", "--category", help="default: the trained one")
    parser.add_argument(
        "--max-drop", type=float, default=0.01, help="of the image AUROC, where there are labels"
    )
    parser.add_argument(
        "--max-rank-change", type=float, default=0.05,
        help="where there are none: 1 - Spearman's correlation of the scores of good images",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=cli.positive, help="only the last ones of the backbone; default: all"
    )  # fmt: skip
    parser.add_argument("--cpu_threads", type=cli.positive, default=1, help="to time it with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Quantize, compare, fit the thresholds anew, and write a bundle if nothing much was lost."""
    args = parse(argv)
    runtime.prepare()
    from datasets.folder import find_category
    from deploy import onnx_export
    from deploy.bundle import publish, read_bundle, write_sidecar

    onnx_export.require_packages("deploy/quantize.py")
    bundle = read_bundle(args.save_inference_dir)
    if Path(args.output).resolve() == bundle.folder.resolve():
        raise UserError(f"--output {args.output}: is the bundle itself; name another folder")
    weights = backbone_weights(bundle)
    name = args.category or bundle.about["model"]["category"]
    category = find_category(Path(args.data), name)
    train, holdout = normals(bundle, category)
    read = _reader(bundle)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spread = np.linspace(0, len(train) - 1, min(len(train), MOST_NORMALS)).round().astype(int)
        quantize(bundle, weights, read([train[i] for i in spread]), folder, args.layers)
        small = _opened(bundle, folder / "model.onnx", args.cpu_threads)
        whole = _opened(bundle, bundle.onnx, args.cpu_threads)
        labelled = [record for record in category.test if record.label in (0, 1)]
        report = compare(whole, small, read, labelled, holdout)
        report["mb"] = [_megabytes(path) for path in (bundle.onnx, folder / "model.onnx")]
        print(render(report))
        refuse_losses(report, args)
        calibration = recalibrated(bundle, small, read, train, holdout)
        write_sidecar(folder, describe(bundle, calibration, report, folder, args.cpu_threads))
        publish(folder, Path(args.output))
    print(f"image {calibration.image.describe()}")
    print(f"quantized model has been saved into {args.output}; run it with --engine onnx")
    return 0


def backbone_weights(bundle: "Bundle") -> set[str]:
    """Return the names of the backbone's weights in the bundle's ONNX graph."""
    import onnx

    from deploy.bundle import QUANTIZED
    from deploy.onnx_export import BACKBONE

    if QUANTIZED in bundle.about:
        raise UserError(f"{bundle.folder}: is quantized already; give the bundle it came from")
    if bundle.onnx is None:
        raise UserError(f"{bundle.folder}: has no model.onnx; export it again with --onnx")
    stored = {p.key: p.value for p in onnx.load(str(bundle.onnx)).metadata_props}
    if BACKBONE not in stored:
        raise UserError(
            f"{bundle.onnx}: does not say which weights are the backbone's; export it again"
        )
    return set(stored[BACKBONE].split())


def normals(bundle: "Bundle", category: Any) -> "tuple[list[Record], list[Record]]":
    """Return the training's normal images and those it held out, split as it did."""
    from datasets.folder import split_holdout

    about = bundle.about["model"]
    if category.holdout:
        train, holdout = category.train, category.holdout
    else:
        train, holdout = split_holdout(category.train, about["holdout"], about["seed"])
    known = bundle.image_threshold.normals or len(holdout)
    if len(train) < FEWEST_NORMALS or len(holdout) != known:
        raise UserError(
            f"{category.root}: {len(train)} good images and {len(holdout)} held out; the model's "
            f"own training data are needed (it held out {known}), and at least {FEWEST_NORMALS}"
        )
    return list(train), list(holdout)


def quantize(
    bundle: "Bundle",
    weights: set[str],
    images: Iterator[np.ndarray],
    folder: Path,
    layers: int | None = None,
) -> None:
    """Write model.onnx with 8-bit backbone into `folder`; `images` (1, 3, H, W) set the ranges."""
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    prepared = folder / "prepared.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(prepared)  # constants become weights, norms are folded
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(bundle.onnx), options, providers=["CPUExecutionProvider"])
    nodes = [
        node.name
        for node in onnx.load(str(prepared)).graph.node
        if node.op_type in OPERATORS and weights & set(node.input)
    ]
    if not nodes:
        raise UserError(f"{bundle.onnx}: no layer of a backbone is left in it to quantize")

    class Images(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"image": image}

    quantization.quantize_static(
        str(prepared), str(folder / "model.onnx"), Images(),
        quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=list(OPERATORS),
        nodes_to_quantize=nodes[-(layers or len(nodes)) :], per_channel=True,
        reduce_range=True,  # 7-bit weights: without VNNI, products of 8 bits overflow 16
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()


def compare(
    whole: "Engine",
    small: "Engine",
    read: Any,
    labelled: "Sequence[Record]",
    normal: "Sequence[Record]",
) -> dict[str, Any]:
    """Return scores' agreement, maps' difference and times of both, [before, after]."""
    from scipy.stats import spearmanr

    from metrics.roc import auroc

    chosen = list(labelled) or list(normal)
    labels = [record.label for record in labelled]
    scores: list[list[float]] = [[], []]
    differences = []
    for image in read(chosen):
        outputs = [engine.run(image) for engine in (whole, small)]
        for mine, output in zip(scores, outputs, strict=True):
            mine.append(float(output.scores[0]))
        differences.append(np.abs(outputs[1].maps - outputs[0].maps).mean())
    report: dict[str, Any] = {
        "images": len(chosen),
        "labelled": len(labels),
        "auroc": [auroc(np.array(mine), labels) for mine in scores]
        if len(set(labels)) == 2
        else [],
        "rank_change": 1 - float(spearmanr(*scores).statistic),
        "map_difference": float(np.mean(differences)),
        "ms": _milliseconds(whole, small, next(read(chosen[:1]))),
    }
    return report


def render(report: dict[str, Any]) -> str:
    """Return the report for people."""
    kind = "labelled test images" if report["labelled"] else "held-out good images"
    lines = [f"backbone in 8 bits against float32, on {report['images']} {kind}:"]
    if report["auroc"]:
        lines.append("  image AUROC {:.4f} -> {:.4f}".format(*report["auroc"]))
    lines.append(f"  order of the scores: 1 - Spearman's correlation {report['rank_change']:.4f}")
    lines.append(f"  mean difference of the maps {report['map_difference']:.4g}")
    lines.append("  ms per image {:.1f} -> {:.1f}, model.onnx {:.1f} -> {:.1f} MB".format(
        *report["ms"], *report["mb"]
    ))  # fmt: skip
    return "\n".join(lines)


def refuse_losses(report: dict[str, Any], args: Namespace) -> None:
    """Raise `UserError` if more was lost than is allowed."""
    if report["auroc"]:
        before, after = report["auroc"]
        if before - after > args.max_drop:
            raise UserError(
                f"{args.output}: not written, since the image AUROC falls by {before - after:.4f}, "
                f"more than --max-drop {args.max_drop:g}; quantize fewer --layers, or stay with "
                f"{args.save_inference_dir}"
            )
    elif not report["rank_change"] <= args.max_rank_change:
        raise UserError(
            f"{args.output}: not written, since the order of scores changes by "
            f"{report['rank_change']:.4f}, more than --max-rank-change {args.max_rank_change:g}; "
            f"quantize fewer --layers, or stay with {args.save_inference_dir}"
        )


def recalibrated(
    bundle: "Bundle",
    small: "Engine",
    read: Any,
    train: "Sequence[Record]",
    holdout: "Sequence[Record]",
) -> "Calibration":
    """Fit thresholds, colour scale, NFA test and NLL anew, by the rules of the bundle's own."""
    from engine.evaluator import calibration_of
    from metrics.nfa import calibrate as fit_nulls
    from metrics.nfa import standard_nulls
    from utils.predictions import joined

    def outputs(records: "Sequence[Record]") -> "Output":
        return joined([small.run(image) for image in read(records)])

    output = outputs(holdout)
    test = bundle.acontrario
    if test is not None and list(test.nulls) != list(standard_nulls(test.channels)):
        test = replace(test, nulls=tuple(fit_nulls(output.evidence, test.channels)))
    policies = bundle.image_threshold.policy, bundle.pixel_threshold.policy
    return calibration_of(output, test, *policies, lambda: outputs(train).maps)


def describe(
    bundle: "Bundle",
    calibration: "Calibration",
    report: dict[str, Any],
    folder: Path,
    threads: int,
) -> dict[str, Any]:
    """Return the content of inference.yml: the bundle's own, with what has changed."""
    from deploy.bundle import QUANTIZED, file_sha256

    entry = {"passed": True, "ms": round(report["ms"][1], 2), "threads": threads}
    kept = {key: value for key, value in bundle.about.items() if key != "parity"}
    return kept | {
        "thresholds": {"image": calibration.image.to_dict(), "pixel": calibration.pixel.to_dict()},
        "color_scale": list(calibration.color_scale),
        "nfa": calibration.acontrario.to_dict() if calibration.acontrario else None,
        "nll": calibration.nll.to_dict() if calibration.nll else None,
        QUANTIZED: report,
        "engines": {"onnx": entry},
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }


def _reader(bundle: "Bundle") -> Any:
    from utils.image import read_image, to_input

    def read(records: "Sequence[Record]") -> Iterator[np.ndarray]:
        for record in records:
            image = to_input(read_image(record.path), bundle.input_size, bundle.resize)
            yield image[None].astype(np.float32)

    return read


def _opened(bundle: "Bundle", model: Path | None, threads: int) -> "Engine":
    from deploy.engines import EngineOptions, OnnxEngine

    return OnnxEngine(
        replace(bundle, onnx=model), EngineOptions(engine="onnx", cpu_threads=threads)
    )


def _milliseconds(whole: "Engine", small: "Engine", image: np.ndarray) -> list[float]:
    """Return the median time of either, run in turn."""
    times: list[list[float]] = [[], []]
    for _ in range(TIMED_RUNS):
        for mine, engine in zip(times, (whole, small), strict=True):
            start = time.perf_counter()
            engine.run(image)
            mine.append(time.perf_counter() - start)
    return [1e3 * float(np.median(mine)) for mine in times]


def _megabytes(path: Path | None) -> float:
    assert path is not None
    return path.stat().st_size / 1e6


if __name__ == "__main__":
    cli.run(main)
