"""Up-sampling and smoothing of maps as products with constant matrices: exact, and exportable."""

import numpy as np
import paddle
from paddle import Tensor, nn
from scipy.ndimage import gaussian_filter1d

Size = tuple[int, int]


class Upsampler(nn.Layer):
    """Bring (B, h, w) to (B, H, W) bilinearly, then blur by a Gaussian of `blur_sigma` pixels.

    Both are linear along each axis, so the result is U·m·Uᵀ with constant matrices, which runs on
    every inference engine. The blur has SciPy's defaults (truncate 4, reflect).
    """

    def __init__(self, small: Size, large: Size, *, align_corners: bool, blur_sigma: float) -> None:
        super().__init__()
        for name, axis in (("rows", 0), ("columns", 1)):
            matrix = upsampling_matrix(small[axis], large[axis], align_corners)
            if blur_sigma > 0:
                matrix = gaussian_filter1d(matrix, blur_sigma, axis=0, mode="reflect")
            tensor = paddle.to_tensor(matrix.astype(np.float32))
            self.register_buffer(name, tensor, persistable=False)

    def forward(self, level: Tensor) -> Tensor:
        wide = paddle.matmul(level, self.columns, transpose_y=True)  # (B, h, W)
        return paddle.matmul(self.rows, wide)  # (B, H, W)


def average(maps: list[Tensor]) -> Tensor:
    """Return the mean of maps of one shape."""
    return sum(maps[1:], maps[0]) / float(len(maps))


def upsampling_matrix(small: int, large: int, align_corners: bool) -> np.ndarray:
    """Return the (large, small) matrix of one-dimensional bilinear interpolation."""
    position = np.arange(large, dtype=np.float64)
    if align_corners:
        source = position * ((small - 1) / max(large - 1, 1))
    else:
        source = (position + 0.5) * (small / large) - 0.5
    source = np.clip(source, 0.0, small - 1)
    low = np.floor(source).astype(np.int64)
    high = np.minimum(low + 1, small - 1)
    matrix = np.zeros((large, small))
    rows = np.arange(large)
    np.add.at(matrix, (rows, low), 1.0 - (source - low))
    np.add.at(matrix, (rows, high), source - low)
    return matrix
