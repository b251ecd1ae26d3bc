"""What checkpoints of Lightning, those of anomalib, tell beside the weights of the network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .common import Arrays

# entries with anomalib's thresholds of images and of pixels; version 2, and those before
IMAGE = ("post_processor._image_threshold", "image_threshold.value")
PIXEL = ("post_processor._pixel_threshold", "pixel_threshold.value")
HAS = {"Compose", "Resize", "Normalize", "ToDtype"}  # steps of its preprocessing that ours has too


@dataclass(frozen=True)
class Facts:
    """Epoch, bound of the clamp and input size (H, W), None where the file does not tell."""

    epoch: int = 0
    alpha: float | None = None
    input_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def facts(content: Any) -> Facts:
    """Read what there is; a file of another kind tells its epoch at most."""
    if not isinstance(content, Mapping):
        return Facts()
    settings = content.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    bounds = [settings.get(key) for key in ("clamp_alpha", "affine_clamp", "clamp")]
    steps = _transforms(content.get("anomalib_pre_processor_config"))
    sizes = [_size(arguments.get("size")) for name, arguments in steps if name == "Resize"]
    unknown = sorted({name for name, _ in steps} - HAS)
    note = f"its preprocessing has steps that ours does not: {', '.join(unknown)}"
    epoch = content.get("epoch")
    return Facts(
        epoch if isinstance(epoch, int) else 0,
        next((float(bound) for bound in bounds if isinstance(bound, int | float)), None),
        sizes[0] if sizes else None,
        (note,) if unknown else (),
    )


def threshold_advice(outside: Arrays, unit: float) -> tuple[str, ...]:
    """Tell anomalib's thresholds in our unit, `unit` above theirs, if it has fitted some."""
    values = []
    for flag, names in (("--image_threshold", IMAGE), ("--pixel_threshold", PIXEL)):
        found = [float(outside[name].reshape(-1)[0]) for name in names if name in outside]
        values += [f"{flag} {value + unit:.6g}" for value in found if math.isfinite(value)]
    if not values:
        return ()
    return (
        f"anomalib's thresholds, in our unit: {' '.join(values)}; they have the largest F1 on "
        "labelled images, so no false-alarm rate is known",
    )


def _transforms(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """List class and arguments of every step of a stored preprocessing."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(value, Mapping):
        if isinstance(path := value.get("class_path"), str):
            found.append((path.rpartition(".")[2], value.get("init_args") or {}))
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            found += _transforms(inner)
    return found


def _size(value: Any) -> tuple[int, int] | None:
    numbers = [value] if isinstance(value, int) else list(value or [])
    if not numbers or not all(isinstance(number, int) for number in numbers):
        return None
    return numbers[0], numbers[-1]
