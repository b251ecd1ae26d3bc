"""The graph of a bundle as ONNX, by paddle2onnx in a child process."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bundle import ONNX
from utils.errors import UserError

OPSETS = (16, 13)  # the second if the first fails; from 17 on, some norms become invalid
SECONDS = 1800.0
NEEDED = ("paddle2onnx", "onnx", "onnxruntime")
BATCH = "batch"
BACKBONE = "backbone_weights"  # names, in the meta data of the file


def require_packages(what: str = "--onnx") -> None:
    """Raise `UserError` unless everything that `what` needs is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what}: {missing[0]} is not installed; pip install -r requirements-onnx.txt "
            "(Python 3.10 to 3.12)"
        )


def convert(folder: Path, outputs: Sequence[str], backbone: Sequence[str] = ()) -> Path:
    """Write model.onnx beside the graph in `folder`, with the given names of outputs.

    `backbone` are the names of the backbone's weights, kept in the file for deploy/quantize.py.
    paddle2onnx ends its process on what it does not know, hence the child. Raise `UserError` if
    there is no valid file then.
    """
    target = folder / ONNX
    fault = ""
    for opset in OPSETS:
        target.unlink(missing_ok=True)
        fault = _convert_in_child(folder, target, opset)
        if not fault:
            break
    if fault:
        raise UserError(
            f"--onnx: {fault}; nothing was written; please report this configuration, and leave "
            "--onnx out to run the bundle with Paddle"
        )
    _make_readable(target, outputs, backbone)
    return target


def _convert_in_child(folder: Path, target: Path, opset: int) -> str:
    """Return why there is no file, or "" if there is one."""
    root = Path(__file__).resolve().parent.parent
    command = [
        sys.executable, "-m", "deploy.onnx_export", str(folder.resolve()), str(target.resolve()),
        str(opset),
    ]  # fmt: skip
    try:
        child = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
            text=True, errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"paddle2onnx took longer than {SECONDS:.0f} s"
    if child.returncode < 0 or child.returncode == 134:  # 134: an abort seen through a shell
        return f"paddle2onnx crashed (code {child.returncode})"
    if child.returncode:
        last = (child.stderr.strip() or child.stdout.strip() or "no message").splitlines()[-1]
        return f"paddle2onnx failed (code {child.returncode}: {last.strip()[:200]})"
    if not target.is_file() or target.stat().st_size == 0:
        return "paddle2onnx wrote no file"
    return ""


def _make_readable(target: Path, outputs: Sequence[str], backbone: Sequence[str] = ()) -> None:
    """Check the file, and give inputs, outputs and the batch axis names for people."""
    import onnx

    model = onnx.load(str(target))
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != len(outputs):
        raise UserError(
            f"--onnx: the graph has {len(graph.input)} inputs and {len(graph.output)} outputs "
            f"instead of 1 and {len(outputs)}; nothing was written; please report this"
        )
    names = {graph.input[0].name: "image"}
    names |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}
    _rename(graph, names)
    for value in (*graph.input, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if dimensions:
            dimensions[0].dim_param = BATCH
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--onnx: the converted graph is invalid ({reason[:200]})") from None
    onnx.helper.set_model_props(model, {BACKBONE: " ".join(backbone)} if backbone else {})
    onnx.save(model, str(target))


def _rename(graph: Any, names: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = names.get(name, name)


def main(argv: Sequence[str]) -> int:
    """Convert: folder, target, opset."""
    folder, target, opset = argv
    import paddle2onnx

    paddle2onnx.export(
        str(Path(folder) / "inference.json"), str(Path(folder) / "inference.pdiparams"), target,
        opset_version=int(opset), auto_upgrade_opset=False, verbose=False,
        optimize_tool="None",  # the others may install packages from the network
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
