"""Compare a converted detector with stored outputs of the code that its weights came from.

A reference is an .npz file. Its input: `image` (B, 3, H, W), RGB in [0, 1], or the features that
enter the flow, `feat{i}` (B, C_i, H_i, W_i), finest level first; with an image these are compared.
Its outputs, any of them: `z{i}`, `logdet{i}` or `jac{i}` (of a level), `logdet` (of all levels),
`anomaly_map` and `score`, in the unit of the source. Those of levels may also be by fibre, as
CFLOW-AD has them, (B·H_i·W_i, …). Other arrays are not looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn

from utils.errors import UserError

TOLERANCE = 1e-4
Reference = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """How far a quantity is from the reference: largest difference, and that per largest value."""

    name: str
    absolute: float
    relative: float
    ok: bool


def read_reference(path: Path) -> dict[str, np.ndarray]:
    """Read the numeric arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if file[name].dtype.kind in "fiu"}
    except (OSError, ValueError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no .npz file with a reference ({reason})") from None


def compare(
    detector: nn.Layer, reference: Reference, *, unit: float | None, tolerance: float
) -> list[Check]:
    """Run a detector on the input of a reference and compare its outputs.

    Our maps and scores are `unit` above the source's; None leaves them out.
    """
    given = [np.asarray(reference[name], np.float32) for name in _levels(reference, "feat")]
    features = [paddle.to_tensor(feature) for feature in given]
    found: dict[str, np.ndarray] = {}
    if "image" in reference:
        image = paddle.to_tensor(np.asarray(reference["image"], np.float32))
        with paddle.no_grad():
            features = detector.features(image)
        found = {f"feat{level}": feature.numpy() for level, feature in enumerate(features)}
    if not features:
        raise UserError("the reference has no input: it needs 'image', or 'feat0', 'feat1' …")
    scorer = None if unit is None else detector.scorer
    found |= outputs(detector.flow, scorer, features, unit or 0.0)
    return differences(found, reference, tolerance)


@paddle.no_grad()
def outputs(
    flow: nn.Layer, scorer: nn.Layer | None, features: Sequence[Tensor], unit: float = 0.0
) -> dict[str, np.ndarray]:
    """Return latents, log-determinants per position, map and score by the reference's names."""
    latents, log_dets = flow(list(features))
    found = {f"z{level}": z.numpy() for level, z in enumerate(latents)}
    for name in ("logdet", "jac"):
        found |= {f"{name}{level}": value.numpy() for level, value in enumerate(log_dets)}
    totals = [value.numpy().astype(np.float64).sum((1, 2, 3)) for value in log_dets]
    found["logdet"] = np.sum(totals, 0)
    if scorer is not None:
        anomaly_map, score = scorer(latents, log_dets)
        found |= {"anomaly_map": anomaly_map.numpy() - unit, "score": score.numpy() - unit}
    return found


def differences(
    found: Mapping[str, np.ndarray], reference: Reference, tolerance: float
) -> list[Check]:
    """Compare what both have; `UserError` if that is nothing or differs in shape."""
    checks = []
    for name in [name for name in found if name in reference]:
        wanted = np.asarray(reference[name], np.float64)
        gap = np.abs(_arranged(found[name].astype(np.float64), wanted.shape, name) - wanted).max()
        relative = float(gap / max(np.abs(wanted).max(), np.finfo(np.float32).tiny))
        checks.append(Check(name, float(gap), relative, relative <= tolerance))
    if not checks:
        raise UserError(f"the reference has no output; known are {', '.join(found)}")
    return checks


def table(checks: Sequence[Check], tolerance: float) -> str:
    """Return lines of text, one per quantity."""
    lines = [f"{'quantity':<12} {'largest difference':>18} {'relative':>10}"]
    for check in checks:
        verdict = "ok" if check.ok else f"FAILED, more than {tolerance:g}"
        lines.append(f"{check.name:<12} {check.absolute:>18.3g} {check.relative:>10.2g}  {verdict}")
    return "\n".join(lines)


def _levels(reference: Reference, kind: str) -> list[str]:
    names = [f"{kind}{level}" for level in range(len(reference))]
    return [name for name in names if name in reference]


def _arranged(values: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Bring values (B, C, H, W) or (B,) to the shape that the reference has them in."""
    if values.ndim == 4 and len(shape) <= 2:
        if shape and shape[0] == len(values) and values.shape[1] == 1:
            values = values.sum((1, 2, 3))  # a log-determinant of the whole level
        else:
            values = values.transpose(0, 2, 3, 1)  # by fibre
    if values.size != np.prod(shape, dtype=np.int64):
        raise UserError(
            f"the reference's '{name}' has shape {list(shape)}, ours {list(values.shape)}: it is "
            "of another input or network"
        )
    return values.reshape(shape)
