"""Detectors: a frozen backbone, a normalizing flow and a scorer, built from plain values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from paddle import nn

from .backbones import build_backbone
from .detector import Detector
from .flows.base import Flow
from .flows.fastflow import FastFlow
from .flows.uflow import UFlow
from .scoring.fastflow import FastFlowScorer
from .scoring.uflow import UFlowScorer

Sizes = list[tuple[int, int]]


def build_detector(model: Mapping[str, Any], seed: int = 0) -> Detector:
    """Build a detector with seeded flow weights; backbone weights are loaded separately.

    `model` is section `model` of a configuration, as a plain dict.
    """
    height, width = model["input_size"]
    backbone = build_backbone(model["backbone"], model["strides"])
    sizes = [(-(-height // s), -(-width // s)) for s in backbone.strides]
    rng = np.random.default_rng(seed)
    flow, scorer = FLOWS[model["flow"]](model, backbone.channels, sizes, rng)
    return Detector(backbone, flow, scorer, (height, width))


def _fastflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, nn.Layer]:
    names = (
        "steps", "hidden_ratio", "conv3x3_only", "coupling", "clamp", "alpha", "norm",
        "norm_momentum", "global_scale", "loss_norm", "init",
    )  # fmt: skip
    flow = FastFlow(channels, sizes, rng=rng, **_chosen(model, names))
    return flow, FastFlowScorer(sizes, tuple(model["input_size"]), **_chosen(model, SCORING))


def _uflow(
    model: Mapping[str, Any], channels: list[int], sizes: Sizes, rng: np.random.Generator
) -> tuple[Flow, nn.Layer]:
    names = ("steps", "hidden_ratio", "clamp", "alpha", "norm", "loss", "init")
    flow = UFlow(channels, sizes, rng=rng, **_chosen(model, names))
    return flow, UFlowScorer(sizes, tuple(model["input_size"]), **_chosen(model, SCORING))


def _chosen(model: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: model[name] for name in names}


SCORING = ("score", "score_from", "align_corners", "blur_sigma")
Builder = Callable[
    [Mapping[str, Any], list[int], Sizes, np.random.Generator], tuple[Flow, nn.Layer]
]
FLOWS: dict[str, Builder] = {"fastflow": _fastflow, "uflow": _uflow}
