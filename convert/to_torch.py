"""A run of ours as a state dict for PyTorch, in the names of anomalib's FastFlow and CFLOW-AD."""

from pathlib import Path
from typing import Any

import numpy as np

from engine import session
from models.backbones.base import Backbone
from models.flows.base import Flow
from utils.config import Config
from utils.errors import UserError
from utils.schema import CFlowModel, FastFlowModel
from utils.torch_file import write_torch

from .common import INVERSE, STEP_NAMES

RESNETS = ("resnet18", "wide_resnet50_2")
TRANSFORMERS = {
    "deit_base_distilled_384": "deit_base_distilled_patch16_384",
    "cait_m48_448": "cait_m48_448",
}
LAYERS = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}  # by stride
STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
# what anomalib's networks have without a choice
FASTFLOW = {
    "coupling": "one_sided", "clamp": "tanh", "alpha": 2.0, "global_scale": "softplus",
}  # fmt: skip
CFLOW = {"clamp": "tanh"}
_FOREIGN = {own: name for name, own in STEP_NAMES.items()}
_CODE = "subnet.first.code_weight"


def export(run: Path, which: str, target: Path) -> list[str]:
    """Write the checkpoint `which` of a run to `target`; return lines for the user.

    Raise `UserError` if anomalib has no such network.
    """
    found, detector, _ = session.open_detector(f"{run.parent}/", run.name, which)
    lines = check(found.config)
    write_torch(target, state_dict(detector.backbone, detector.flow, found.config))
    return [*lines, f"state dict in {target}"]


def check(config: Config) -> list[str]:
    """Return how to build anomalib's network and what differs; `UserError` if there is none."""
    model = config.model
    wanted: dict[str, Any]
    if isinstance(model, FastFlowModel):
        known = (*RESNETS, *TRANSFORMERS)
        wanted = {**FASTFLOW, "norm": "layer" if model.backbone in RESNETS else "none"}
    elif isinstance(model, CFlowModel) and model.code_channels:
        known, wanted = RESNETS, CFLOW
    else:
        raise UserError("--to torch: takes FastFlow, and CFLOW-AD with a position code, only")
    if model.backbone not in known:
        raise UserError(
            f"--to torch: backbone {model.backbone} is not one of anomalib's {', '.join(known)}"
        )
    for key, value in wanted.items():
        if getattr(model, key) != value:
            raise UserError(
                f"--to torch: model.{key} is {getattr(model, key)}; anomalib's network has {value} "
                "only"
            )
    lines = [f"for anomalib's {_constructor(model)}"]
    if model.padding == "reflect":
        lines.append("note: anomalib pads with zeros, not by reflection; its borders will differ")
    if model.backbone in TRANSFORMERS:
        lines.append("note: without the blocks behind the tap: load_state_dict(…, strict=False)")
    return [*lines, "note: thresholds and scoring stay behind, and are anomalib's own there"]


def _constructor(model: FastFlowModel | CFlowModel) -> str:
    backbone = TRANSFORMERS.get(model.backbone, model.backbone)
    if isinstance(model, CFlowModel):
        layers = [LAYERS[stride] for stride in model.strides]
        return (
            f"CflowModel(backbone={backbone!r}, layers={layers}, coupling_blocks={model.steps}, "
            f"condition_vector={model.code_channels}, clamp_alpha={model.alpha})"
        )
    return (
        f"FastflowModel(input_size={model.input_size}, backbone={backbone!r}, "
        f"flow_steps={model.steps}, conv3x3_only={model.conv3x3_only}, "
        f"hidden_ratio={model.hidden_ratio})"
    )


def state_dict(backbone: Backbone, flow: Flow, config: Config) -> dict[str, np.ndarray]:
    """Return all weights in the names of anomalib's network, without `model.` in front."""
    is_cflow = isinstance(config.model, CFlowModel)
    encoder = "encoder.feature_extractor." if is_cflow else "feature_extractor."
    root = "decoders" if is_cflow else "fast_flow_blocks"
    state = {encoder + name: array for name, array in backbone_state(backbone).items()}
    own = {name: value.numpy() for name, value in flow.state_dict().items()}
    for name, array in own.items():
        if name.startswith("norms."):
            state[name] = array
        elif not name.endswith(_CODE):
            _, level, step, leaf = name.split(".", 3)
            place = f"{root}.{level}.module_list.{step}."
            code = (
                own.get(f"levels.{level}.{step}.{_CODE}") if leaf == "subnet.first.weight" else None
            )
            entry = _entry(leaf, array, code)
            state |= {place + key: _shaped(key, a, is_cflow) for key, a in entry.items()}
    return state


def _entry(leaf: str, array: np.ndarray, code: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return one entry of a step under anomalib's name; two for what mixes channels."""
    if leaf in ("affine.permutation", "affine.rotation"):
        matrix = np.eye(len(array), dtype=np.float32)[array] if array.ndim == 1 else array
        return {"w_perm": matrix, INVERSE: matrix.T}
    if code is not None:
        array = np.concatenate([array, code], 1)
    return {_FOREIGN[leaf]: array}


def _shaped(name: str, array: np.ndarray, is_cflow: bool) -> np.ndarray:
    """Give vectors and matrices of a step the axes that they have in PyTorch."""
    if name.startswith("global_"):
        array = array[None]
    if not is_cflow and not name.startswith("subnet."):
        array = array[:, :, None, None]
    return np.ascontiguousarray(array)


def backbone_state(backbone: Backbone) -> dict[str, np.ndarray]:
    """Return the weights of a backbone in timm's names, matrices as (outputs, inputs)."""
    state = {}
    for name, value in backbone.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        array = value.numpy()
        state[f"{layer}.{STATISTICS.get(leaf, leaf)}".removeprefix(".")] = array
        if array.ndim == 2:
            state[name] = np.ascontiguousarray(array.T)
        if leaf == "_variance":
            state[f"{layer}.num_batches_tracked"] = np.zeros((), np.int64)
    return state
