"""Turn a checkpoint of another project into a run of ours, or a run into a file for PyTorch."""

import re
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from datasets.folder import find_category
from engine import checkpoint, inputs, session
from engine.batches import in_order
from engine.evaluator import Calibration, calibrate
from models import backbone_options
from models.backbones import build_backbone
from models.backbones.weights import fit as fit_weights
from models.backbones.weights import state_dict
from models.detector import Detector
from utils import cli, runtime
from utils.config import Config, assignments
from utils.download import file_hash
from utils.errors import UserError
from utils.files import atomic_replace
from utils.weight_file import WeightFile, read_weight_file

from . import sources, to_torch
from .foreign import Foreign, understand
from .verify import TOLERANCE, compare, read_reference, table

UNFITTED = "no thresholds: give --normals FOLDER of good images, or predict.py's own flags"
PEAKS = (
    "nor maps that mean something: CFLOW-AD compares with the likelihoods of normal images, which "
    "the file does not hold; without --normals there is only eval.py --norm dataset"
)
OPTIMISTIC = "if the model was trained on these images, the false-alarm rate is optimistic"


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.prog = "python -m convert detector"
    parser.add_argument("input", help="a checkpoint; with --to the folder of a run")
    parser.add_argument("--out", required=True, help="results/<exp>/<category>; with --to a file")
    parser.add_argument("--to", choices=("torch",), help="write a state dict in anomalib's names")
    parser.add_argument("--source", choices=("auto", *sources.NAMES), default="auto")
    parser.add_argument("--backbone", metavar="NAME", help="if the file does not tell")
    parser.add_argument("--backbone-weights", metavar="FILE", help="instead of those in the file")
    parser.add_argument("--clamp", choices=("tanh", "tanh_scaled", "atan"), help="FrEIA's formula")
    parser.add_argument("--input-size", metavar="N", help="or HxW; default: that of the source")
    parser.add_argument("--category", help="default: the name of the folder --out")
    parser.add_argument("--normals", metavar="FOLDER", help="good images, to fit thresholds on")
    parser.add_argument("--verify", metavar="REF.npz", help="compare with outputs of the source")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of --verify, relative")
    cli.add_checkpoint(parser)
    cli.add_flag(parser, "--overwrite", "replace a run in --out")
    parser.add_argument("-o", action="append", default=[], metavar="section.key=value")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Convert one file; 1 if it does not give the reference's outputs."""
    args = parse(argv)
    runtime.prepare()
    runtime.use_device("cpu")
    if args.to:
        for line in to_torch.export(Path(args.input), args.checkpoint, Path(args.out)):
            print(line)
        return 0
    return convert(Path(args.input), Path(args.out), args)


def convert(path: Path, run: Path, args: Namespace) -> int:
    """Write the run of a checkpoint; nothing is written unless all of it succeeds."""
    if checkpoint.names(run) and not args.overwrite:
        raise UserError(f"{run}: holds a run; --overwrite replaces it, --out names another")
    reference = read_reference(Path(args.verify)) if args.verify else None
    category = args.category or run.resolve().name
    file = read_weight_file(path)
    foreign = _understand(file, category, args)
    print(foreign.line())
    for note in foreign.notes:
        print(f"note: {note}")
    run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=run.parent) as temporary:
        own = None
        if foreign.backbone and not args.backbone_weights:
            own = Path(temporary) / checkpoint.BACKBONE
            store_backbone(foreign, file, own)
        detector, backbone = load(foreign, own)
        calibration, data = fit(detector, foreign.config, args.normals, category)
        if reference is not None:
            checks = compare(
                detector, reference, unit=foreign.source.unit, tolerance=args.tolerance
            )
            print(table(checks, args.tolerance))
            if foreign.source.unit is None:
                print("map and score not compared: the source's depend on the other images")
            if not all(check.ok for check in checks):
                print(f"--verify FAILED; nothing was written to {run}")
                return 1
        meta = {
            **_about(foreign, path, category), "backbone": backbone, "data": data,
            "calibration": calibration.to_dict() if calibration else None,
        }  # fmt: skip
        write(run, detector, foreign.config, meta, own)
    print(f"run in {run}; next: python predict.py --exp_dir {run.parent} -cat {run.name}")
    return 0


def _understand(file: WeightFile, category: str, args: Namespace) -> Foreign:
    flags = {
        "model.clamp": args.clamp, "model.input_size": _size(args.input_size),
        "model.weights": args.backbone_weights, "data.root": args.normals,
    }  # fmt: skip
    try:
        return understand(
            file.content, source=args.source, backbone=args.backbone, category=category,
            user=[*assignments(flags), *args.o],
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def _size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
    if found is None:
        raise UserError(f"--input-size {text}: give N or HEIGHTxWIDTH in pixels, like 256")
    return [int(found[1]), int(found[2] or found[1])]


def store_backbone(foreign: Foreign, file: WeightFile, target: Path) -> None:
    """Write the backbone's weights of a foreign file under our names."""
    model = vars(foreign.config.model)
    backbone = build_backbone(model["backbone"], model["strides"], **backbone_options(model))
    arrays = state_dict(replace(file, content=foreign.backbone))
    save_file(fit_weights(backbone, arrays, str(file.path))[0], target)


def load(foreign: Foreign, backbone: Path | None) -> tuple[Detector, dict[str, Any]]:
    """Build the detector; return it and where the weights of its backbone came from."""
    detector, info = session.new_detector(foreign.config, allow_random=False, weights=backbone)
    head = {f"flow.{name}": array for name, array in foreign.flow.head.items()}
    scorer = {k: v.numpy() for k, v in detector.head_state().items() if k.startswith("scorer.")}
    checkpoint.fill_head(detector, head | scorer, foreign.source.title)
    detector.eval()
    if backbone is not None:
        info["source"] = backbone.name
    return detector, info


def fit(
    detector: Detector, config: Config, normals: str | None, category: str
) -> tuple[Calibration | None, dict[str, Any]]:
    """Fit scorer and thresholds on normal images, if there are any; say what data that was."""
    if normals is None:
        print(f"{UNFITTED}\n{PEAKS}" if detector.scorer.learns else UNFITTED)
        return None, {"train": 0, "holdout": 0, "digest": ""}
    records = find_category(Path(normals), category, config.data.layout).train
    if len(records) < 2:
        raise UserError(f"{normals}: {len(records)} good image(s); --normals needs at least 2")
    source = inputs.image_source(records, config, detector)
    detector.fit_scorer(source.pyramids(in_order(source.count, config.eval.batch_size)))
    calibration = calibrate(detector, source, config, source)
    print(f"thresholds from {len(records)} good images; {OPTIMISTIC}")
    print(f"image {calibration.image.describe()}\npixel {calibration.pixel.describe()}")
    digest = inputs.data_digest(records, config, detector.backbone.weight_hash)
    return calibration, {"train": 0, "holdout": len(records), "digest": digest}


def _about(foreign: Foreign, path: Path, category: str) -> dict[str, Any]:
    """Return what meta.json says of where a run came from."""
    progress = {"epoch": foreign.epoch, "step": 0, "best": {}, "best_epoch": foreign.epoch}
    return {
        "category": category, "preset": f"converted:{foreign.source.name}",
        "versions": runtime.versions(), "progress": {**progress, "loss": 0.0},
        "converted": {
            "source": foreign.source.title, "file": path.name, "sha256": file_hash(path),
            "network": foreign.flow.about, "notes": list(foreign.notes),
        },
    }  # fmt: skip


def write(
    run: Path, detector: Detector, config: Config, meta: dict[str, Any], backbone: Path | None
) -> None:
    """Write the folder of a run: its backbone, if it has one of its own, and both checkpoints."""
    checkpoint.remove_run(run)
    if backbone is not None:
        with atomic_replace(run / checkpoint.BACKBONE) as temporary:
            backbone.replace(temporary)
    for name in ("last", "best"):
        checkpoint.save(run / name, detector, config, meta)
