"""Channel operations of a flow, each in the layout that is fast where it runs.

Eager mode computes channels-last (B, H, W, C); a static graph computes channels-first (B, C, H, W),
which every inference engine and ONNX want. The maths above this module sees neither.
"""

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor


def channels_last() -> bool:
    """Tell whether tensors inside a flow are (B, H, W, C)."""
    return paddle.in_dynamic_mode()


def channel_axis() -> int:
    """Return the axis of the channels inside a flow."""
    return 3 if channels_last() else 1


def enter(x: Tensor) -> Tensor:
    """Bring (B, C, H, W) into the layout of the flow."""
    return x.transpose([0, 2, 3, 1]) if channels_last() else x


def leave(x: Tensor) -> Tensor:
    """Bring a tensor of the flow's layout back to (B, C, H, W)."""
    return x.transpose([0, 3, 1, 2]) if channels_last() else x


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut the channels into consecutive groups of the given sizes."""
    return paddle.split(x, list(sizes), axis=channel_axis())


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Join channel groups."""
    return paddle.concat(list(parts), axis=channel_axis())


def channel_sum(x: Tensor) -> Tensor:
    """Sum over the channels, keeping the axis."""
    return x.sum(channel_axis(), keepdim=True)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with zero "same" padding; weight is (C_out, C_in, k, k) with odd k."""
    padding = weight.shape[2] // 2
    layout = "NHWC" if channels_last() else "NCHW"
    return F.conv2d(x, weight, bias, padding=padding, data_format=layout)


def mix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map the channels of every position, y = weight · x + bias; weight is (C_out, C_in)."""
    if channels_last():
        return paddle.matmul(x, weight, transpose_y=True) + bias
    return F.conv2d(x, weight.unsqueeze([2, 3]), bias)


def per_channel(vector: Tensor) -> Tensor:
    """Shape a (C,) vector so that it broadcasts over the flow's tensors."""
    return vector if channels_last() else vector.reshape([1, -1, 1, 1])
