"""The fixed code of a position that conditions CFLOW-AD's flows."""

import numpy as np
import paddle
from paddle import Tensor, nn


class PositionCode(nn.Layer):
    """Hold the code of one resolution, (1, P, H, W): a constant, outside checkpoints."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        code = position_code(channels, *size).astype(np.float32)
        self.register_buffer("code", paddle.to_tensor(code[None]), persistable=False)

    def forward(self) -> Tensor:
        return self.code


def position_code(channels: int, height: int, width: int) -> np.ndarray:
    """Return sines and cosines of the position, (P, H, W) float64.

    The first half of the P channels encodes the column, the second the row, each by frequencies
    10000^(−4k/P), sine and cosine in turn. Raise ValueError unless P is a positive multiple of 4.
    """
    if channels < 4 or channels % 4:
        raise ValueError(f"position code of {channels} channels: use a positive multiple of 4")
    half = channels // 2
    frequency = 10000.0 ** (-2.0 * np.arange(half // 2) / half)
    code = np.empty((channels, height, width))
    code[:half] = _waves(width, frequency)[:, None, :]
    code[half:] = _waves(height, frequency)[:, :, None]
    return code


def _waves(length: int, frequency: np.ndarray) -> np.ndarray:
    phase = frequency[:, None] * np.arange(length)  # (P/4, length)
    return np.stack([np.sin(phase), np.cos(phase)], 1).reshape(-1, length)  # (P/2, length)
