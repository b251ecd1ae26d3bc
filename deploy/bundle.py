"""An exported bundle on disk: graphs, parameters and inference.yml, read and checked."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metrics.acontrario import AContrario
from metrics.drift import NormalNll
from metrics.threshold import Threshold
from utils.errors import UserError
from utils.files import atomic_write_bytes

FORMAT = 1
SIDECAR = "inference.yml"
GRAPHS = ("inference.json", "inference.pdmodel")  # Paddle 3 writes the first, Paddle 2 the second
PARAMETERS = "inference.pdiparams"
ONNX = "model.onnx"  # optional
NLL = "nll"  # name of an output
QUANTIZED = "quantization"  # its report; such a bundle has no graph but ONNX


@dataclass(frozen=True)
class Bundle:
    """What a bundle says about itself."""

    folder: Path
    graph: Path | None  # none where the backbone is quantized
    parameters: Path | None
    onnx: Path | None
    input_size: tuple[int, int]  # height, width
    resize: str
    image_threshold: Threshold
    pixel_threshold: Threshold
    color_scale: tuple[float, float]
    acontrario: AContrario | None
    nll: NormalNll | None
    engines: Mapping[str, Mapping[str, Any]]  # what the export found out about each; may be empty
    about: Mapping[str, Any]  # the whole of inference.yml


def read_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle; `UserError` if a file is missing, changed or not understood."""
    folder = Path(folder)
    sidecar = folder / SIDECAR
    if not sidecar.is_file():
        raise UserError(
            f"{folder}: no {SIDECAR} here; make the bundle with deploy/export_model.py, or mend "
            "--save_inference_dir"
        )
    about = _load(sidecar)
    graph: Path | None = None
    parameters: Path | None = None
    onnx = folder / ONNX if ONNX in about["files"] else None
    if QUANTIZED not in about:
        graph = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
        if graph is None:
            raise UserError(f"{folder}: none of {', '.join(GRAPHS)} is here; export again")
        parameters = folder / PARAMETERS
    for path in filter(None, (graph, parameters, onnx)):
        expected = about["files"].get(path.name)
        if expected is None or file_sha256(path) != expected:
            raise UserError(f"{path}: not the file that {SIDECAR} describes; export again")
    try:
        return _described(about, folder=folder, graph=graph, parameters=parameters, onnx=onnx)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else "a value is missing or wrong"
        raise UserError(f"{sidecar}: {reason}; export again") from None


def _described(about: Mapping[str, Any], **paths: Any) -> Bundle:
    height, width = about["input"]["size"]
    low, high = about["color_scale"]
    return Bundle(
        **paths,
        input_size=(int(height), int(width)),
        resize=about["input"]["resize"],
        image_threshold=Threshold.from_dict(about["thresholds"]["image"]),
        pixel_threshold=Threshold.from_dict(about["thresholds"]["pixel"]),
        color_scale=(float(low), float(high)),
        acontrario=AContrario.from_dict(about["nfa"]) if about.get("nfa") else None,
        nll=NormalNll.from_dict(about[NLL]) if about.get(NLL) else None,
        engines=_measured(about.get("engines") or {}),
        about=about,
    )


def _measured(engines: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(engines, dict):
        raise TypeError("engines are listed by name")
    for name, entry in engines.items():
        if not isinstance(entry["passed"], bool) or (entry["passed"] and not entry["ms"] > 0):
            raise ValueError(f"engine {name} has no result")
    return engines


def _load(sidecar: Path) -> dict[str, Any]:
    try:
        about = yaml.safe_load(sidecar.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{sidecar}: not a YAML file; export again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise UserError(f"{sidecar}: bundle format {found!r}; this version reads {FORMAT}")
    needed = ("files", "input", "thresholds", "color_scale")
    missing = [key for key in needed if key not in about]
    if not missing and not isinstance(about["files"], dict):
        missing = ["files"]
    if missing:
        raise UserError(f"{sidecar}: '{missing[0]}' is missing; export again")
    return about


def write_sidecar(folder: Path, about: Mapping[str, Any]) -> None:
    """Write inference.yml."""
    text = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True)
    (folder / SIDECAR).write_text(text, encoding="utf-8")


def publish(folder: Path, target: Path) -> None:
    """Bring the files of a bundle into `target`, each one atomically and inference.yml last.

    Until that last file is there, its hashes tell a reader that the others are not its own. An
    ONNX graph of an older export does not stay beside a new one.
    """
    if not (folder / ONNX).is_file():
        (target / ONNX).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SIDECAR):
        atomic_write_bytes(target / path.name, path.read_bytes())


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file; `UserError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
