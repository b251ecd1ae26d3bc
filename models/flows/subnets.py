"""Networks that predict scale and shift inside a coupling step."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from . import ops


class Conv(nn.Layer):
    """Convolve with zero "same" padding, initialised as PyTorch or Paddle would.

    `torch`: weights and biases uniform in ±1/√fan_in. `paddle`: weights normal with standard
    deviation √(2/fan_in), biases 0 (2.45 times wider).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        init: str,
        rng: np.random.Generator,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.stride = stride
        fan_in = c_in * kernel * kernel
        shape = (c_out, c_in, kernel, kernel)
        if init == "torch":
            bound = 1.0 / math.sqrt(fan_in)
            weight, bias = rng.uniform(-bound, bound, shape), rng.uniform(-bound, bound, c_out)
        else:
            weight, bias = rng.normal(0.0, math.sqrt(2.0 / fan_in), shape), np.zeros(c_out)
        self.weight = parameter(self, weight)
        self.bias = parameter(self, bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv(x, self.weight, self.bias, self.stride)


class ConvSubnet(nn.Layer):
    """Conv k×k, ReLU, conv k×k; no normalisation, no zero initialisation (FastFlow, U-Flow)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        hidden: int,
        kernel: int,
        init: str,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden_ratio leaves no hidden channel for {c_in}: raise it")
        self.first = Conv(c_in, hidden, kernel, init, rng)
        self.second = Conv(hidden, c_out, kernel, init, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


@paddle.no_grad()
def scale_output(layer: nn.Layer, factor: Tensor | float) -> None:
    """Scale the weight and bias of a linear layer: its output is `factor` times what it was."""
    layer.weight.set_value(layer.weight * factor)
    layer.bias.set_value(layer.bias * factor)


def parameter(layer: nn.Layer, value: np.ndarray) -> Tensor:
    """Make a trainable float32 parameter that starts at `value`."""
    created = layer.create_parameter(
        shape=list(value.shape),
        dtype="float32",
        default_initializer=nn.initializer.Constant(0.0),
    )
    created.set_value(value.astype(np.float32))  # initializer.Assign is 40 times slower
    return created
