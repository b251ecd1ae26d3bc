"""A checkpoint of another project, understood: its network, its weights, our configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.backbones import BACKBONES
from utils.config import Config, assignments, load, override
from utils.errors import UserError

from .common import Arrays, Flow
from .lightning import Facts, facts, threshold_advice
from .sources import Source, identify

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# backbones that foreign checkpoints carry: an entry that tells them from the others, its shape
SIGNATURES = (
    ("mcait", "extractor2.pos_embed", (1, 196, 384)),
    ("deit_base_distilled_384", "dist_token", (1, 1, 768)),
    ("cait_m48_448", "pos_embed", (1, 784, 768)),
    ("wide_resnet50_2", "layer1.0.conv2.weight", (128, 128, 3, 3)),
    ("resnet18", "layer1.0.conv2.weight", (64, 64, 3, 3)),
    ("efficientnet_b5", "features.0.0.weight", (48, 3, 3, 3)),
)


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as `understand` finds it; `backbone` has the names of the file, or is empty."""

    source: Source
    flow: Flow
    backbone: dict[str, np.ndarray]
    config: Config
    epoch: int
    notes: tuple[str, ...]

    def line(self) -> str:
        """Say in one line what the file is."""
        model = self.config.model
        where = "with its weights" if self.backbone else "whose weights are not in the file"
        size = "×".join(map(str, model.input_size))
        return (
            f"source: {self.source.title}: {self.flow.about}; {model.backbone} {where}, "
            f"input {size}"
        )


def understand(
    content: Any, *, source: str, backbone: str | None, category: str, user: Sequence[str]
) -> Foreign:
    """Read the content of a file; `user` are overrides `section.key=value`, which count most.

    Raise `UserError` if it is no checkpoint of `source` or if its entries are not those of one.
    """
    found = identify(content, source)
    known = facts(content)
    name = backbone or recognise(found.backbone)
    start = _preset(found.source, name, category)
    asked = override(start, user).model
    keys = (text.partition("=")[0].strip().partition(".") for text in user)
    given = {key: getattr(asked, key) for section, _, key in keys if section == "model"}
    flow = found.source.read(found.flow, given)
    config = _complete(start, flow, name, known, user)
    notes = [*found.source.notes, *flow.notes, *known.notes]
    if found.source.unit is not None:
        notes += threshold_advice(found.outside, found.source.unit)
    return Foreign(found.source, flow, found.backbone, config, known.epoch, tuple(notes))


def recognise(arrays: Arrays) -> str | None:
    """Name the backbone whose weights these are; None if there are none."""
    for name, key, shape in SIGNATURES:
        if key in arrays and arrays[key].shape == shape:
            return name
    if not arrays:
        return None
    raise UserError(
        f"unknown backbone, its names are like {', '.join(list(arrays)[:3])}; recognised are "
        f"{', '.join(name for name, *_ in SIGNATURES)}, any other of ours by --backbone NAME"
    )


def _preset(source: Source, backbone: str | None, category: str) -> Config:
    """Return the shipped configuration that is nearest to a source, for one category."""
    same = [name for name in source.presets if name.endswith(f"_{backbone}")]
    preset = (same or list(source.presets))[0]
    settings = assignments(source.settings)
    return override(load(CONFIGS / f"{preset}.yaml").for_category(category), settings)


def _complete(
    start: Config, flow: Flow, backbone: str | None, known: Facts, user: Sequence[str]
) -> Config:
    """Return `start` with what names and shapes say, then what the file says, then the user."""
    name = backbone or start.model.backbone
    strides = _strides(name, flow)
    values: dict[str, Any] = {f"model.{key}": value for key, value in flow.model.items()}
    values |= {
        "model.backbone": name, "model.strides": strides, "model.alpha": known.alpha,
        "model.input_size": _input_size(name, strides, flow, known),
    }  # fmt: skip
    return override(start, [*assignments(values), *user])


def _strides(backbone: str, flow: Flow) -> list[int]:
    """Return the strides of the backbone's taps that have the channels of the flow's levels."""
    if backbone not in BACKBONES:
        raise UserError(f"unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}")
    taps = {channels: stride for stride, (_, channels) in BACKBONES[backbone].taps.items()}
    wanted = flow.channels[:1] if flow.model["flow"] == "csflow" else flow.channels
    strides = [taps.get(count, 0) for count in wanted]
    if 0 in strides or strides != sorted(set(strides)):
        raise UserError(
            f"levels of {', '.join(map(str, wanted))} channels are none of backbone {backbone}, "
            f"which has {', '.join(map(str, sorted(taps)))}; give another --backbone"
        )
    return strides


def _input_size(
    backbone: str, strides: Sequence[int], flow: Flow, known: Facts
) -> list[int] | None:
    """Return what the layer norms, the backbone or the file prescribe; None if nothing does."""
    if flow.sizes:
        return [int(side) * strides[0] for side in flow.sizes[0]]
    network = BACKBONES[backbone]
    fixed = getattr(getattr(network, "fine", network), "image_size", None)  # of transformers
    if fixed is not None:
        return [fixed, fixed]
    return list(known.input_size) if known.input_size else None
