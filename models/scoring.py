"""From latents and log-determinants to an anomaly map and a score per image."""

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from scipy.ndimage import gaussian_filter1d

SCORES = ("probability", "energy", "nll")


class FastFlowScorer(nn.Layer):
    """Turn each level's mean squared latent m into a map, up-sample, average; score = maximum.

    `probability`: 1 − exp(−m/2), from 0 to 1; `energy`: m/2, which does not saturate; `nll`:
    m/2 − log|det J|/C, the likelihood that training maximises, in nats per dimension.
    The map is smoothed by a Gaussian of `blur_sigma` input pixels (SciPy's defaults: truncate 4,
    reflect); the score is taken before that (`sharp`) or from the smoothed map (`smooth`).

    Bilinear up-sampling and blur are linear, so each level needs two products with constant
    matrices, U·m·Uᵀ: exact, and it runs on every inference engine.
    """

    def __init__(
        self,
        level_sizes: Sequence[tuple[int, int]],
        input_size: tuple[int, int],
        *,
        score: str,
        align_corners: bool,
        blur_sigma: float,
        score_from: str = "sharp",
    ) -> None:
        super().__init__()
        self.score = score
        self.blurred = blur_sigma > 0
        self.sharp_score = score_from == "sharp"
        for level, size in enumerate(level_sizes):
            for axis, name in enumerate(("rows", "columns")):
                matrix = upsampling_matrix(size[axis], input_size[axis], align_corners)
                self._constant(f"{name}_{level}", matrix)
                if self.blurred:
                    smooth = gaussian_filter1d(matrix, blur_sigma, axis=0, mode="reflect")
                    self._constant(f"smooth_{name}_{level}", smooth)

    def _constant(self, name: str, value: np.ndarray) -> None:
        tensor = paddle.to_tensor(value.astype(np.float32))
        self.register_buffer(name, tensor, persistable=False)

    def forward(self, latents: list[Tensor], log_dets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the map (B, 1, H, W) at input size and the score (B,); higher is worse."""
        levels = [self._level_map(z, log_dets[level]) for level, z in enumerate(latents)]
        smooth = self._average(levels, "smooth_" if self.blurred else "")  # (B, H, W)
        sharp = self._average(levels, "") if self.blurred and self.sharp_score else smooth
        return smooth.unsqueeze(1), sharp.max([1, 2])

    def _level_map(self, z: Tensor, log_det: Tensor) -> Tensor:
        half_energy = (z * z).sum(1) * (0.5 / z.shape[1])  # (B, h, w)
        if self.score == "probability":
            return 1.0 - paddle.exp(-half_energy)
        if self.score == "nll":
            return half_energy - log_det.squeeze(1) / float(z.shape[1])
        return half_energy

    def _average(self, levels: list[Tensor], prefix: str) -> Tensor:
        full = []
        for index, level in enumerate(levels):
            rows = getattr(self, f"{prefix}rows_{index}")  # (H, h)
            columns = getattr(self, f"{prefix}columns_{index}")  # (W, w)
            wide = paddle.matmul(level, columns, transpose_y=True)  # (B, h, W)
            full.append(paddle.matmul(rows, wide))  # (B, H, W)
        return sum(full[1:], full[0]) / float(len(full))


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
