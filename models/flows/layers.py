"""Invertible layers: clamps, feature norms, global affine with permutation, coupling steps."""

import math
from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from . import ops
from .subnets import parameter, scale_output

Subnet = Callable[[int, int], nn.Layer]  # (channels in, channels out) -> network

# FrEIA before August 2023 clamps with α·tanh(a); later versions with α·tanh(a/α); 0.636 ≈ 2/π.
CLAMPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "tanh": lambda a, alpha: alpha * paddle.tanh(a),
    "tanh_scaled": lambda a, alpha: alpha * paddle.tanh(a / alpha),
    "atan": lambda a, alpha: (alpha * 0.636) * paddle.atan(a / alpha),
}
COUPLINGS = ("one_sided", "two_sided")
GLOBAL_SCALES = ("softplus", "raw")
NORMS = ("layer", "batch", "none")
_DAMPING = 0.1  # of the networks' outputs (FrEIA)
_SCALE_FLOOR = 1e-6  # a raw scale may reach 0, whose logarithm would poison the optimiser


class FeatureLayerNorm(nn.Layer):
    """Normalise (B, C, H, W) over C, H and W of each image, with an affine map per element.

    Written out in stages: Paddle's sum over several axes loses digits, and its fused kernel
    does not run on every inference engine.
    """

    def __init__(self, channels: int, size: tuple[int, int], epsilon: float = 1e-5) -> None:
        super().__init__()
        shape = (channels, *size)
        self.weight = parameter(self, np.ones(shape))
        self.bias = parameter(self, np.zeros(shape))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        centred = x - _mean_per_image(x)
        variance = _mean_per_image(centred * centred)
        return centred * paddle.rsqrt(variance + self.epsilon) * self.weight + self.bias


def _mean_per_image(x: Tensor) -> Tensor:
    total = x.sum(3, keepdim=True).sum(2, keepdim=True).sum(1, keepdim=True)  # (B, 1, 1, 1)
    return total / float(x.shape[1] * x.shape[2] * x.shape[3])


def feature_norm(kind: str, channels: int, size: tuple[int, int], momentum: float) -> nn.Layer:
    """Build the norm between backbone and flow; `momentum` is BatchNorm's retention factor."""
    if kind == "layer":
        return FeatureLayerNorm(channels, size)
    if kind == "batch":
        return nn.BatchNorm2D(channels, momentum=momentum, epsilon=1e-5)
    return nn.Identity()


class GlobalAffine(nn.Layer):
    """Scale and shift every channel, then permute or rotate: y = P·(u ⊙ g + o).

    `permutation` holds indices (C,), y_i = (u ⊙ g + o)_π(i), or a constant rotation matrix (C, C).
    `softplus`: g = 0.1·softplus(G, β=0.5) = 0.2·ln(1 + exp(G/2)), G starts where g = 1.
    `raw`: g is the parameter itself, starting at 1 (FastFlow-Paddle).
    """

    def __init__(self, permutation: np.ndarray, form: str) -> None:
        super().__init__()
        channels = len(permutation)
        start = 2.0 * math.log(math.exp(5.0) - 1.0) if form == "softplus" else 1.0  # 9.98647850
        self.form = form
        self.scale = parameter(self, np.full(channels, start))
        self.offset = parameter(self, np.zeros(channels))
        self.rotates = permutation.ndim == 2
        if self.rotates:
            matrix = paddle.to_tensor(permutation.astype(np.float32))
            self.register_buffer("rotation", matrix)
        else:
            index = paddle.to_tensor(permutation.astype(np.int64))
            self.register_buffer("permutation", index)
        self._folded: tuple[Tensor, Tensor, Tensor] | None = None

    def gain(self) -> Tensor:
        """Return g, shape (C,)."""
        if self.form == "raw":
            return self.scale
        return 0.2 * F.softplus(self.scale * 0.5)  # softplus_0.5(G) = 2·ln(1 + exp(G/2)), × 0.1

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrix (C, C) and bias (C,) of the whole layer, and Σ ln|g| as a scalar."""
        if self._folded is not None:
            return self._folded
        gain = self.gain()
        if self.rotates:
            matrix, bias = self.rotation, paddle.matmul(self.rotation, self.offset)
        else:
            one_hot = F.one_hot(self.permutation, gain.shape[0])  # [i, π(i)] = 1
            matrix, bias = one_hot.astype(gain.dtype), paddle.gather(self.offset, self.permutation)
        return matrix * gain, bias, _log_det(gain)

    def fold(self) -> None:
        """Replace the parameters by constants, for export; training afterwards has no effect."""
        with paddle.no_grad():
            matrix, bias, log_det = (term.detach() for term in self.terms())
        self.register_buffer("folded_matrix", matrix, persistable=False)
        self.register_buffer("folded_bias", bias, persistable=False)
        self.register_buffer("folded_log_det", log_det, persistable=False)
        self._folded = (self.folded_matrix, self.folded_bias, self.folded_log_det)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self._folded is None and ops.channels_last() and _wide(u):
            return self._in_turn(u)
        matrix, bias, log_det = self.terms()
        return ops.mix(u, matrix, bias), log_det

    def _in_turn(self, u: Tensor) -> tuple[Tensor, Tensor]:
        gain = self.gain()
        v = u * gain + self.offset
        if self.rotates:
            return ops.mix(v, self.rotation), _log_det(gain)
        return paddle.gather(v, self.permutation, axis=ops.channel_axis()), _log_det(gain)

    def inverse(self, y: Tensor) -> Tensor:
        if self.rotates:
            v = ops.mix(y, self.rotation.transpose([1, 0]))
        else:
            v = paddle.index_select(y, paddle.argsort(self.permutation), axis=ops.channel_axis())
        return (v - ops.per_channel(self.offset)) / ops.per_channel(self.gain())


def _wide(u: Tensor) -> bool:
    """Tell whether the gradient of a (C, C) product would cost more than it saves (measured)."""
    return u.shape[0] * u.shape[1] * u.shape[2] <= 2 * u.shape[3]


def _log_det(gain: Tensor) -> Tensor:
    return paddle.log(paddle.clip(gain.abs(), min=_SCALE_FLOOR)).sum()


class CouplingStep(nn.Layer):
    """Transform one part of the channels by a network of the other, then scale, shift, permute.

    One-sided (FrEIA's all-in-one block): x2 ← x2·exp(s) + t with (s, t) from x1.
    Two-sided (FastFlow-Paddle): the same, then x1 ← x1·exp(s') + t' with (s', t') from the new x2.
    Network outputs are damped by 0.1, and s = clamp(·). Tensors are in the flow's layout.
    A `condition` is handed to the networks as second argument (CFLOW-AD). `permutation`: see
    `GlobalAffine`.
    """

    def __init__(
        self,
        permutation: np.ndarray,
        subnet: Subnet,
        *,
        coupling: str,
        clamp: str,
        alpha: float,
        global_scale: str,
    ) -> None:
        super().__init__()
        channels = len(permutation)
        second = channels // 2
        first = channels - second  # the larger part when the number is odd
        self.sizes = (first, second)
        self.damping = _DAMPING
        self.clamp, self.alpha = CLAMPS[clamp], alpha
        self.subnet = subnet(first, 2 * second)
        self.subnet_back = subnet(second, 2 * first) if coupling == "two_sided" else None
        self.affine = GlobalAffine(permutation, global_scale)

    def _scale_shift(
        self, net: nn.Layer, given: Tensor, size: int, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        both = net(given) if condition is None else net(given, condition)
        if self.damping != 1.0:
            both = self.damping * both
        log_scale, shift = ops.split(both, (size, size))
        return self.clamp(log_scale, self.alpha), shift

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and the log-determinant of every position (one channel, flow's layout)."""
        first, second = ops.split(x, self.sizes)
        log_scale, shift = self._scale_shift(self.subnet, first, self.sizes[1], condition)
        second = second * paddle.exp(log_scale) + shift
        log_det = ops.channel_sum(log_scale)
        if self.subnet_back is not None:
            log_scale, shift = self._scale_shift(self.subnet_back, second, self.sizes[0], condition)
            first = first * paddle.exp(log_scale) + shift
            log_det = log_det + ops.channel_sum(log_scale)
        y, log_gain = self.affine(ops.concat((first, second)))
        return y, log_det + log_gain

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return x such that forward(x, condition) gives y."""
        first, second = ops.split(self.affine.inverse(y), self.sizes)
        if self.subnet_back is not None:
            log_scale, shift = self._scale_shift(self.subnet_back, second, self.sizes[0], condition)
            first = (first - shift) * paddle.exp(-log_scale)
        log_scale, shift = self._scale_shift(self.subnet, first, self.sizes[1], condition)
        second = (second - shift) * paddle.exp(-log_scale)
        return ops.concat((first, second))

    def fold(self) -> None:
        """Move the damping into the networks' last layers, for export."""
        for net in (self.subnet, self.subnet_back):
            if net is not None:
                scale_output(net.second, self.damping)
        self.damping = 1.0
