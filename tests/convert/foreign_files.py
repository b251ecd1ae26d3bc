"""Checkpoints of other projects for tests: drawn from stored names, or made from flows of ours."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.common import BACK_NAMES, INVERSE, STEP_NAMES
from tests.golden import seeded_detectors
from tests.golden import seeded_weights as seeded
from utils.torch_file import write_torch

FOLDER = Path(__file__).parents[1] / "golden" / "convert"
CASES = ("fastflow", "cflow", "csflow", "uflow")
SETTINGS: dict[str, dict[str, Any]] = {  # anomalib's hyper_parameters that count
    "fastflow": {"backbone": "resnet18", "flow_steps": 3},
    "cflow": {"backbone": "resnet18", "clamp_alpha": 1.7, "layers": ["layer2", "layer3", "layer4"]},
    "csflow": {"clamp": 3},
    "uflow": {"backbone": "resnet18", "affine_clamp": 2.0},
}
FOREIGN = {own: name for name, own in {**STEP_NAMES, **BACK_NAMES}.items()}


@cache
def reference(case: str) -> dict[str, np.ndarray]:
    """Return what anomalib's detector gives for `image`, and that."""
    with np.load(FOLDER / f"{case}.npz") as file:
        found = {name: file[name] for name in file.files if name not in ("names", "size")}
        return {"image": seeded_detectors.photograph(*map(int, file["size"])), **found}


@cache
def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in a file of anomalib's."""
    with np.load(FOLDER / f"{case}.npz") as file:
        return seeded.from_text(file["names"].tobytes().decode())


def state_dict(case: str) -> dict[str, np.ndarray]:
    """Draw the state dict of anomalib's detector; it has an image threshold, the others are nan."""
    thresholds = {k: np.float32(np.nan) for k in shapes(case) if k.startswith("post_processor.")}
    network = {k: s for k, s in shapes(case).items() if k not in thresholds}
    drawn = seeded_detectors.draw_all(network)
    thresholds["post_processor._image_threshold"] = np.float32(-0.25)
    return {**drawn, **{name: np.asarray(value) for name, value in thresholds.items()}}


def network(case: str) -> dict[str, np.ndarray]:
    """Draw the weights of anomalib's network alone, without `model.` in front."""
    arrays = state_dict(case)
    return {k.removeprefix("model."): a for k, a in arrays.items() if k.startswith("model.")}


def checkpoint(case: str, path: Path) -> Path:
    """Write a file as Lightning does."""
    size = list(reference(case)["image"].shape[2:])
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": size}}
    write_torch(path, state_dict(case), {
        "epoch": 7, "hyper_parameters": SETTINGS[case],
        "anomalib_pre_processor_config": {"transform": {
            "class_path": "torchvision.transforms.v2.Compose",
            "init_args": {"transforms": [resize]},
        }},
    })  # fmt: skip
    return path


def renamed(arrays: dict[str, np.ndarray], *rules: tuple[str, str]) -> dict[str, np.ndarray]:
    """Replace patterns in all names."""
    result = {}
    for name, array in arrays.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        result[name] = array
    return result


def as_freia(name: str, array: np.ndarray, place: str, *, axes: bool) -> dict[str, np.ndarray]:
    """Return an entry of a flow of ours, `levels.{l}.{k}.…`, under the names of a file.

    With `axes` vectors and matrices have those of a map.
    """
    _, level, step, leaf = name.split(".", 3)
    prefix = place.format(level, step)
    if leaf in ("affine.permutation", "affine.rotation"):
        matrix = np.eye(len(array), dtype=np.float32)[array] if array.ndim == 1 else array
        entries = {"w_perm": matrix, INVERSE: np.ascontiguousarray(matrix.T)}
    else:
        entries = {FOREIGN[leaf]: array[None] if leaf.startswith("affine.") else array}
    if axes:
        entries = {k: a[:, :, None, None] if a.ndim == 2 else a for k, a in entries.items()}
    return {prefix + key: value for key, value in entries.items()}
