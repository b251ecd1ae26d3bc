"""Channel operations of a flow, each in the layout that is fast where it runs.

Eager mode computes channels-last (B, H, W, C); a static graph computes channels-first (B, C, H, W),
which every inference engine and ONNX want. The maths above this module sees neither.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from . import onednn


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
    if channels_last():
        return list(_Split.apply(x, list(sizes)))
    return paddle.split(x, list(sizes), axis=channel_axis())


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Join channel groups."""
    if channels_last():
        return _Concat.apply(*parts)
    return paddle.concat(list(parts), axis=channel_axis())


class _Split(PyLayer):
    """Cut the last axis, whose gradient is a join."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return _groups(x, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _joined(gradients)


class _Concat(PyLayer):
    """Join along the last axis, whose gradient is a split."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[-1] for part in parts]
        ctx.wanted = [not part.stop_gradient for part in parts]
        return _joined(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(_groups(gradient, ctx.sizes), ctx.wanted, strict=True)
        return tuple(each if wanted else None for each, wanted in found)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    joined = onednn.concat(parts)
    return paddle.concat(list(parts), axis=-1) if joined is None else joined


def _groups(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if (parts := onednn.split(x, sizes)) is not None:
        return parts
    # copied slices take a quarter of the time of Paddle's split
    ends = list(itertools.accumulate(sizes))
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    return tuple(x[..., a:b].contiguous() for a, b in zip(starts, ends, strict=True))


def pixel_shuffle(x: Tensor) -> Tensor:
    """Double height and width: channel 4c + 2p + q goes to channel c at rows 2i+p, columns 2j+q."""
    # a reshape behind a transpose would do as well, but oneDNN fuses and breaks it
    return F.pixel_shuffle(x, 2, data_format="NHWC" if channels_last() else "NCHW")


def pixel_unshuffle(x: Tensor) -> Tensor:
    """Undo `pixel_shuffle`; not for export (ONNX)."""
    return F.pixel_unshuffle(x, 2, data_format="NHWC" if channels_last() else "NCHW")


def channel_sum(x: Tensor) -> Tensor:
    """Sum over the channels, keeping the axis."""
    return x.sum(channel_axis(), keepdim=True)


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Convolve with zero "same" padding; weight is (C_out, C_in, k, k) with odd k."""
    if channels_last() and (y := onednn.conv(x, weight, bias, stride)) is not None:
        return y
    padding = weight.shape[2] // 2
    layout = "NHWC" if channels_last() else "NCHW"
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, data_format=layout)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Multiply negative values by a slope below 1.

    Paddle Inference with oneDNN crashes on leaky_relu behind a convolution, hence the maximum;
    its gradient is slow, hence not in eager mode.
    """
    return F.leaky_relu(x, slope) if channels_last() else paddle.maximum(x, x * slope)


def resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Map the spatial axes by constant matrices, rows (H', H) and columns (W', W)."""
    height, width = rows.shape[0], columns.shape[0]
    channels = x.shape[channel_axis()]
    if channels_last():
        wide = paddle.matmul(columns, x)  # (B, H, W', C)
        tall = paddle.matmul(rows, wide.reshape([-1, rows.shape[1], width * channels]))
        return tall.reshape([-1, height, width, channels])
    # oneDNN is wrong where a product meets the 4-D output of a convolution
    flat = x.reshape([-1, rows.shape[1], columns.shape[1]])  # (B·C, H, W)
    wide = paddle.matmul(flat, columns, transpose_y=True)  # (B·C, H, W')
    return paddle.matmul(rows, wide).reshape([-1, channels, height, width])


def mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map the channels of every position, y = weight · x + bias; weight is (C_out, C_in)."""
    if channels_last():
        return _mix_last(x, weight, bias)
    return F.conv2d(x, weight.unsqueeze([2, 3]), bias)


def _mix_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    is_map = x.shape[1] > 1  # the number of single fibres (CFLOW-AD) may change at every step
    if is_map and (y := onednn.conv(x, weight.unsqueeze([2, 3]), bias, 1)) is not None:
        return y
    y = paddle.matmul(x, weight, transpose_y=True)
    return y if bias is None else y + bias


def per_channel(vector: Tensor) -> Tensor:
    """Shape a (C,) vector so that it broadcasts over the flow's tensors."""
    return vector if channels_last() else vector.reshape([1, -1, 1, 1])
