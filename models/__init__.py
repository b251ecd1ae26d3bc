"""Detectors: a frozen backbone, a normalizing flow and a scorer, built from plain values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .backbones import build_backbone
from .backbones.multiscale import MultiScale
from .detector import Detector
from .flows.base import Flow
from .flows.cflow import CFlow
from .flows.csflow import CSFlow
from .flows.fastflow import FastFlow
from .flows.uflow import UFlow
from .scoring.base import Evidence, Scorer
from .scoring.cflow import CFlowScorer
from .scoring.csflow import CSFlowScorer
from .scoring.fastflow import FastFlowScorer

Sizes = list[tuple[int, int]]


def build_detector(
    model: Mapping[str, Any], seed: int = 0, nfa: Mapping[str, Any] | None = None
) -> Detector:
    """Build a detector with seeded flow weights; backbone weights are loaded separately.

    `model` and `nfa` are sections of a configuration, as plain dicts. Raise ValueError for values
    that do not fit each other, `UserError` for what the backbone cannot do.
    """
    height, width = model["input_size"]
    backbone = build_backbone(model["backbone"], model["strides"], **backbone_options(model))
    if model["flow"] == "csflow":
        backbone = MultiScale(backbone)
    backbone.check_input_size(height, width)
    sizes = [(-(-height // s), -(-width // s)) for s in backbone.strides]
    rng = np.random.default_rng(seed)
    flow, scorer = FLOWS[model["flow"]](model, backbone.channels, sizes, rng)
    evidence = None
    if nfa is not None and nfa["method"] != "none":
        evidence = Evidence(nfa["method"], nfa["probability"])
    return Detector(backbone, flow, scorer, (height, width), evidence)


def _fastflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, Scorer]:
    names = (
        "steps", "hidden_ratio", "conv3x3_only", "coupling", "clamp", "alpha", "norm",
        "norm_momentum", "global_scale", "loss_norm", "init", "permute",
    )  # fmt: skip
    flow = FastFlow(channels, sizes, rng=rng, **_chosen(model, names))
    return flow, FastFlowScorer(sizes, tuple(model["input_size"]), **_chosen(model, SCORING))


def _cflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, Scorer]:
    names = ("steps", "code_channels", "permute", "clamp", "alpha")
    flow = CFlow(channels, sizes, rng=rng, **_chosen(model, names))
    scorer = CFlowScorer(
        sizes, tuple(model["input_size"]), quantile=model["peak_quantile"],
        blur_sigma=model["blur_sigma"],
    )  # fmt: skip
    return flow, scorer


def _csflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, Scorer]:
    names = ("blocks", "hidden", "alpha", "permutation", "last_kernel", "use_gamma")
    flow = CSFlow(channels, sizes, rng=rng, **_chosen(model, names))
    size = tuple(model["input_size"])
    return flow, CSFlowScorer(sizes, size, **_chosen(model, ("score", "map_from")))


def _uflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, Scorer]:
    names = ("steps", "hidden_ratio", "clamp", "alpha", "norm", "loss", "init", "permute")
    flow = UFlow(channels, sizes, rng=rng, **_chosen(model, names))
    return flow, FastFlowScorer(sizes, tuple(model["input_size"]), **_chosen(model, SCORING))


def backbone_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what section `model` asks of the backbone beyond its name and strides."""
    names = ("padding", "before_norm", "last_block")
    return {name: model[name] for name in names if model[name] not in (None, False)}


def _chosen(model: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: model[name] for name in names}


SCORING = ("score", "score_from", "align_corners", "blur_sigma")
Builder = Callable[[Mapping[str, Any], list[int], Sizes, np.random.Generator], tuple[Flow, Scorer]]
FLOWS: dict[str, Builder] = {
    "fastflow": _fastflow,
    "cflow": _cflow,
    "csflow": _csflow,
    "uflow": _uflow,
}
