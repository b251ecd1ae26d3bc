"""Where a number stopped being finite."""

from collections.abc import Callable

import paddle
from paddle import Tensor, nn


def first_non_finite(layer: nn.Layer, call: Callable[[], object]) -> str:
    """Name the first parameter, else the first sublayer's output, that holds NaN or infinity.

    `call` runs the forward pass once more, with every sublayer watched.
    """
    for name, parameter in layer.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    found: list[str] = []
    handles = [
        sublayer.register_forward_post_hook(_watch(name, found))
        for name, sublayer in layer.named_sublayers()
    ]
    try:
        with paddle.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return f"output of {found[0]}" if found else "the sum of the loss"


def _watch(name: str, found: list[str]) -> Callable[..., None]:
    def hook(layer: nn.Layer, inputs: object, output: object) -> None:
        tensors = output if isinstance(output, list | tuple) else [output]
        if not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    return hook


def _finite(tensor: Tensor) -> bool:
    return bool(paddle.isfinite(tensor).all()) if tensor.is_floating_point() else True
