"""Checkpoint folders: head weights, optimizer state and meta data, written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from engine.curves import BOARDS
from utils.config import Config, differences, from_dict
from utils.errors import UserError
from utils.files import atomic_folder, atomic_write_text, recover_folder
from utils.safe_pickle import read_pdparams

FORMAT = 1
# What a resumed run may set anew: where things are, how fast, how often, how long.
MAY_CHANGE = (
    "data.root", "data.layout", "data.workers", "data.cache", "data.cache_dir", "train.epochs",
    "train.log_every", "train.patience", "model.weights",
)  # fmt: skip
HEAD, OPTIMIZER, META = "head.safetensors", "optimizer.safetensors", "meta.json"
PADDLE_HEAD = "head.pdparams"  # the same weights in the form that Paddle users expect
BACKBONE = "backbone.safetensors"  # beside the checkpoints of a run that came with its own


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says: where it is, its configuration and its meta data."""

    folder: Path
    config: Config
    meta: dict[str, Any]

    def load_head(self, detector: nn.Layer) -> None:
        """Put the trained weights into a detector; `UserError` if the names or shapes differ."""
        path = self.folder / HEAD
        state = _read_tensors(path) if path.exists() else _read_pdparams(self.folder)
        fill_head(detector, state, str(self.folder / HEAD))

    def load_optimizer(self, detector: nn.Layer, optimizer: paddle.optimizer.Optimizer) -> None:
        """Put back the optimizer's accumulators, by the names of the detector's parameters."""
        state = _read_tensors(self.folder / OPTIMIZER)
        values = {}
        for name, parameter in _trained(detector).items():
            for key in [k for k in state if k.startswith(name + "/")]:
                values[parameter.name + key[len(name) + 1 :]] = paddle.to_tensor(state[key])
        if len(values) != len(state):
            raise UserError(
                f"{self.folder / OPTIMIZER}: belongs to another configuration; restore the file "
                f"that was written with {HEAD}"
            )
        optimizer.set_state_dict(values)


def fill_head(detector: nn.Layer, state: Mapping[str, np.ndarray], where: str) -> None:
    """Put trained weights into a detector; `UserError` if the names or shapes differ."""
    expected = detector.head_state()
    for name, tensor in expected.items():
        if name not in state or list(state[name].shape) != list(tensor.shape):
            raise UserError(
                f"{where}: '{name}' is missing or has another shape; "
                "the file belongs to another configuration"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise UserError(f"{where}: unknown entry '{extra[0]}'")
    for name, tensor in expected.items():
        tensor.set_value(paddle.to_tensor(state[name]))


def save(
    folder: Path,
    detector: nn.Layer,
    config: Config,
    meta: Mapping[str, Any],
    optimizer: paddle.optimizer.Optimizer | None = None,
) -> None:
    """Write a checkpoint folder in place of an older one."""
    head = {name: value.numpy() for name, value in detector.head_state().items()}
    document = {"format": FORMAT, **meta, "config": config.to_dict()}
    with atomic_folder(folder) as temporary:
        save_file(head, temporary / HEAD)
        paddle.save(detector.head_state(), str(temporary / PADDLE_HEAD))
        if optimizer is not None:
            save_file(_optimizer_state(detector, optimizer), temporary / OPTIMIZER)
        _write_meta(temporary / META, document)


def names(run: Path) -> list[str]:
    """Return the names of the checkpoints of a run: `last`, `best`, `best_auroc` …, in order."""
    found = {path.parent.name for path in run.glob(f"*/{META}") if path.parent.suffix != ".old"}
    return sorted(found, key=lambda name: (name != "last", name))


def update_meta(checkpoint: Checkpoint, **values: Any) -> Checkpoint:
    """Add values to the meta data of a checkpoint on disk."""
    meta = {**checkpoint.meta, **values}
    _write_meta(checkpoint.folder / META, meta)
    return Checkpoint(checkpoint.folder, checkpoint.config, meta)


def read(folder: Path) -> Checkpoint | None:
    """Read a checkpoint folder; None if there is none, `UserError` if it is damaged."""
    recover_folder(folder)
    path = folder / META
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not a JSON file; the checkpoint is damaged") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: checkpoint format {found!r}; this version reads {FORMAT}")
    if missing := [key for key in ("config", "progress", "backbone", "data") if key not in meta]:
        raise UserError(f"{path}: '{missing[0]}' is missing; the checkpoint is damaged")
    return Checkpoint(folder, from_dict(meta["config"], str(path)), meta)


def open_run(run: Path, which: str) -> Checkpoint:
    """Read `<run>/<which>` (`best`, `last` …); `UserError` with what there is if it is missing."""
    checkpoint = read(run / which)
    if checkpoint is None and (others := names(run)):
        raise UserError(f"{run}: no '{which}' checkpoint here; there is {', '.join(others)}")
    if checkpoint is None:
        known = sorted(str(p.parent.parent) for p in run.parent.parent.glob(f"*/*/{which}/{META}"))
        there = f"; there is {', '.join(known[:5])}" if known else ""
        raise UserError(
            f"{run}: no '{which}' checkpoint here; train first, or mend --exp_dir{there}"
        )
    return checkpoint


def check_same_run(checkpoint: Checkpoint, config: Config) -> None:
    """Raise `UserError` if going on with this configuration would not continue the same run."""
    fixed = {"train.epochs"} if config.train.schedule != "constant" else set()  # shape all rates
    for name, (stored, ours) in differences(checkpoint.config, config).items():
        matters = name not in MAY_CHANGE or name in fixed
        if matters and name.startswith(("model.", "data.", "train.")):
            raise UserError(
                f"{checkpoint.folder}: the run has {name} = {stored}, not {ours}; resume with its "
                "own value or start another run"
            )


def goes_on(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> bool:
    """Tell whether a run in `folder` is to be continued; `UserError` if it may not be touched."""
    if overwrite and not resume:
        return False
    last = read(folder / "last")
    if last is None:
        return False
    if not resume:
        raise UserError(
            f"{folder}: holds a run of {last.meta['progress']['epoch']} epochs; "
            "--resume goes on with it, --overwrite replaces it, --exp_dir names another"
        )
    if "converted" in last.meta:
        raise UserError(
            f"{folder}: was converted from a file without an optimizer, so its training cannot go "
            "on; --exp_dir names another run"
        )
    check_same_run(last, config)
    return True


def check_same_data(checkpoint: Checkpoint, meta: Mapping[str, Any]) -> None:
    """Raise `UserError` if backbone weights or training images are not those of the run."""
    then, now = checkpoint.meta, meta
    if then["backbone"]["sha256"] != now["backbone"]["sha256"]:
        raise UserError(
            f"{checkpoint.folder}: backbone weights changed since ({then['backbone']['source']}"
            f" became {now['backbone']['source']}); put them back or start another run"
        )
    if then["data"]["digest"] != now["data"]["digest"]:
        raise UserError(
            f"{checkpoint.folder}: training images changed since; restore them or start another run"
        )


def remove_run(folder: Path) -> None:
    """Delete the checkpoints and logs of a run; anything else in the folder stays."""
    curves = [board.folder for board in BOARDS]
    for name in ("last", "last.old", *curves, *(path.name for path in folder.glob("best*"))):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("train.log", "log.jsonl", BACKBONE):
        (folder / name).unlink(missing_ok=True)


def _trained(detector: nn.Layer) -> dict[str, Tensor]:
    return {n: p for n, p in detector.named_parameters() if not p.stop_gradient}


def _optimizer_state(
    detector: nn.Layer, optimizer: paddle.optimizer.Optimizer
) -> dict[str, np.ndarray]:
    """Key accumulators by the parameter's place in the detector: Paddle's names are counters."""
    state = optimizer.state_dict()
    result = {}
    for name, parameter in _trained(detector).items():
        for key, value in state.items():
            if key.startswith(parameter.name + "_"):
                result[f"{name}/{key[len(parameter.name) :]}"] = value.numpy()
    return result


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); the checkpoint is damaged") from None


def _read_pdparams(folder: Path) -> dict[str, np.ndarray]:
    path = folder / PADDLE_HEAD
    if not path.is_file():
        raise UserError(f"{folder}: neither {HEAD} nor {PADDLE_HEAD} here; restore one of them")
    return read_pdparams(path)


def _write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    text = json.dumps(meta, indent=1, ensure_ascii=False, default=_plain)
    atomic_write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
