"""Frozen ImageNet networks by name."""

import inspect
from collections.abc import Sequence
from typing import Any

from utils.errors import UserError

from .base import Backbone
from .efficientnet import EfficientNetLite0
from .efficientnet_b5 import EfficientNetB5
from .mcait import MultiScaleCait
from .mobilenet import MobileNetV2, MobileNetV3Large
from .resnet import ResNet18, WideResNet50
from .vit import CaitM48, CaitS24, DeitBaseDistilled384

BACKBONES: dict[str, type[Backbone]] = {
    backbone.name: backbone
    for backbone in (
        EfficientNetLite0, EfficientNetB5, ResNet18, WideResNet50, MobileNetV2, MobileNetV3Large,
        DeitBaseDistilled384, CaitM48, CaitS24, MultiScaleCait,
    )
}  # fmt: skip


def build_backbone(name: str, strides: Sequence[int] | None = None, **options: Any) -> Backbone:
    """Build backbone `name` with a tap at each stride, and without the layers behind the last one.

    `strides` of None are the class's default. `options` go to the class. The weights are those of
    a fresh network: call `load_weights` next. Raise `UserError` for an unknown name, stride or
    option.
    """
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[name]
    known = inspect.signature(backbone).parameters
    for option in options:
        if option not in known:
            raise UserError(f"backbone {name} has no option {option!r}; leave model.{option} out")
    return backbone(backbone.default_strides if strides is None else strides, **options)
