"""Batch norms folded into the convolutions before them, for export."""

import numpy as np
import paddle
from paddle import Tensor, nn

from .base import Backbone


@paddle.no_grad()
def fold_batch_norms(backbone: nn.Layer, image: Tensor) -> int:
    """Fold every batch norm that follows a convolution into its weights; return how many.

    `image` (1, 3, H, W) is run once to see what follows what. A convolution whose output is itself
    a tap keeps its norm. Afterwards the backbone can run, but load no weights.
    """
    pairs = _pairs(backbone, image)
    for norm, conv in pairs.items():
        _fold(conv, norm)
    for parent in backbone.sublayers(include_self=True):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, nn.Identity())
    return len(pairs)


def _pairs(backbone: nn.Layer, image: Tensor) -> dict[nn.Layer, nn.Layer]:
    """Return norm -> convolution for all norms that take a convolution's output."""
    made: dict[int, tuple[Tensor, nn.Layer]] = {}  # tensors are kept: an id must stay theirs
    pairs: dict[nn.Layer, nn.Layer] = {}
    taps: list[Tensor] = []

    def after_conv(conv: nn.Layer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = (output, conv)

    def before_norm(norm: nn.Layer, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs[norm] = made[id(inputs[0])][1]

    def after_backbone(layer: nn.Layer, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
        taps.extend(output)

    hooks = []
    for layer in backbone.sublayers(include_self=True):
        if isinstance(layer, nn.Conv2D):
            hooks.append(layer.register_forward_post_hook(after_conv))
        elif isinstance(layer, nn.BatchNorm2D):
            hooks.append(layer.register_forward_pre_hook(before_norm))
        elif isinstance(layer, Backbone):
            hooks.append(layer.register_forward_post_hook(after_backbone))
    try:
        backbone(image)
    finally:
        for hook in hooks:
            hook.remove()
    tapped = {made[id(tap)][1] for tap in taps if id(tap) in made}
    return {norm: conv for norm, conv in pairs.items() if conv not in tapped}


def _fold(conv: nn.Layer, norm: nn.Layer) -> None:
    mean, variance, gain, shift = (
        value.numpy().astype(np.float64)
        for value in (norm._mean, norm._variance, norm.weight, norm.bias)
    )
    gain = gain / np.sqrt(variance + norm._epsilon)  # (C_out,)
    bias = conv.bias.numpy() if conv.bias is not None else 0.0
    weight = conv.weight.numpy() * gain[:, None, None, None]
    conv.weight.set_value(weight.astype(np.float32))
    if conv.bias is None:
        conv.bias = conv.create_parameter([len(gain)], is_bias=True)
        conv.bias.stop_gradient = True
    conv.bias.set_value((shift + (bias - mean) * gain).astype(np.float32))
