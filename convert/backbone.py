"""Convert pretrained weights of a backbone (PyTorch, Paddle) to a file with the names here."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import save_file

from models.backbones import BACKBONES, Backbone, build_backbone, efficientnet_b5
from models.backbones.names import TIMM_EPSILON, Arrays, with_epsilon
from models.backbones.weights import fit, read_weights, state_dict
from utils import cli
from utils.download import file_hash
from utils.errors import UserError
from utils.files import atomic_replace
from utils.weight_file import read_weight_file

SUFFIXES = (".safetensors", ".pdparams")
SHOWN = 4  # names in a message
# timm's names of the same networks, without what follows the dot
ALIASES = {
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large_100": "mobilenet_v3_large",
    "tf_efficientnet_lite0": "efficientnet_lite0",
    "tf_efficientnet_b5": "efficientnet_b5",
    "deit_base_distilled_patch16_384": "deit_base_distilled_384",
}


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.prog = "python -m convert backbone"
    parser.add_argument(
        "input", nargs="+", help="file of weights; for mcait one of CaiT-M48, then one of CaiT-S24"
    )
    names = ", ".join((*BACKBONES, *ALIASES))
    parser.add_argument(
        "--arch", required=True, help=f"{names}; timm's tags, as in resnet18.tv_in1k, are taken"
    )
    parser.add_argument("--out", required=True, help=f"{' or '.join(SUFFIXES)} file")
    cli.add_flag(parser, "--overwrite", "replace --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> int:
    """Convert one backbone."""
    args = parse(argv)
    name, has_timm_epsilon = resolve(args.arch)
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: must end in {' or '.join(SUFFIXES)}")
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out}: exists; --overwrite replaces it")
    backbone = outline(name)
    arrays = read([Path(path) for path in args.input], backbone)
    arrays, unused = fit_or_suggest(backbone, arrays, " and ".join(args.input))
    if has_timm_epsilon:
        arrays = with_epsilon(arrays, TIMM_EPSILON, efficientnet_b5.EPSILON)
        print(f"batch norms: scaled from epsilon {TIMM_EPSILON:g} to {efficientnet_b5.EPSILON:g}")
    write(out, arrays)
    print(f"not used: {listed(unused)}")
    print(f"wrote {out}: {name}, {counted(arrays)}, sha256 {file_hash(out)}")
    mean, std = (" ".join(f"{value:g}" for value in each) for each in (backbone.mean, backbone.std))
    print(f"{name} normalises images with mean {mean}, std {std}: use weights trained so")
    print(f"next: -o model.backbone={name} -o model.weights={out}")
    return 0


def resolve(arch: str) -> tuple[str, bool]:
    """Return the backbone that `arch` means, and whether its batch norms have timm's epsilon.

    Only where the names in a file do not tell it: for timm's own EfficientNet-B5.
    """
    name, tag, _ = arch.removeprefix("timm/").replace("-", "_").partition(".")
    is_timm = bool(tag) or arch.startswith("timm/")
    if is_timm and name == "efficientnet_lite0":
        raise UserError(
            f"--arch {arch}: timm's own efficientnet_lite0 pads and normalises differently from "
            "the network here, which is its tf_efficientnet_lite0"
        )
    own = ALIASES.get(name, name)
    if own not in BACKBONES:
        raise UserError(f"--arch {arch}: choose one of {', '.join((*BACKBONES, *ALIASES))}")
    return own, is_timm and name == "efficientnet_b5"


def outline(name: str) -> Backbone:
    """Build a backbone with all its taps, but without memory for its weights."""
    with paddle.LazyGuard():
        return build_backbone(name, list(BACKBONES[name].taps))


def read(paths: list[Path], backbone: Backbone) -> Arrays:
    """Read the files, one for each network in `backbone`, or one of all; say what they hold."""
    prefixes = list(backbone.parts()) if len(paths) > 1 else [""]
    if len(paths) != len(prefixes):
        most = " or ".join(map(str, sorted({1, len(prefixes)})))
        raise UserError(f"{len(paths)} input files; {backbone.name} takes {most}")
    arrays: Arrays = {}
    for prefix, path in zip(prefixes, paths, strict=True):
        file = read_weight_file(path)
        own = state_dict(file)
        print(f"read {path}: {file.form}, {counted(own)}")
        if file.skipped:
            print(f"left out, as no plain value: {listed(file.skipped)}")
        arrays |= {prefix + key: array for key, array in own.items()}
    return arrays


def fit_or_suggest(backbone: Backbone, arrays: Arrays, source: str) -> tuple[Arrays, list[str]]:
    """Do what `fit` does; the error names the backbone that the weights do fit, if there is one."""
    try:
        return fit(backbone, arrays, source)
    except UserError as error:
        others = [f"--arch {name}" for name in fitting(arrays) if name != backbone.name]
        if not others:
            raise
        raise UserError(f"{error}; it does fit with {' or '.join(others)}") from None


def fitting(arrays: Arrays) -> list[str]:
    """Return the names of the backbones that these arrays are weights of."""
    names = []
    for name in BACKBONES:
        try:
            fit(outline(name), arrays, "")
        except UserError:
            continue
        names.append(name)
    return names


def write(path: Path, arrays: Arrays) -> None:
    """Write a file, sorted by name, that appears only if it reads back as it should."""
    arrays = {key: arrays[key] for key in sorted(arrays)}
    with atomic_replace(path) as temporary:
        if path.suffix == ".pdparams":
            paddle.save({k: paddle.to_tensor(array) for k, array in arrays.items()}, str(temporary))
        else:
            save_file(arrays, temporary)
        found = read_weights(temporary)
        if found.keys() != arrays.keys() or not all(
            np.array_equal(found[key], array, equal_nan=True) for key, array in arrays.items()
        ):
            raise UserError(f"{path}: does not read back as it was written; is the disk sound?")


def counted(arrays: Arrays) -> str:
    """Say how much there is."""
    return f"{len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} values"


def listed(names: Sequence[str]) -> str:
    """Name the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "nothing"
