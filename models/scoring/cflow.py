"""CFLOW-AD's scorer: likelihoods of the levels relative to their best on training normals."""

from collections.abc import Iterable, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn

from ..flows.cflow import LOG_PEAK, log_likelihoods
from .base import Scorer
from .maps import Size, Upsampler, upsampling_matrix


class CFlowScorer(Scorer):
    """Map L − Σ over the L levels of exp(min(ℓ − peak, 0)), up-sampled; score = its maximum.

    ℓ is the log-likelihood of a fibre per dimension, and a level's peak the `quantile` of ℓ over
    all fibres of training normals (1: the maximum), a constant after `fit`. Values lie in [0, L].
    The map is smoothed by a Gaussian of `blur_sigma` input pixels (official and anomalib: 0).
    """

    learns = True

    def __init__(
        self,
        level_sizes: Sequence[Size],
        input_size: Size,
        *,
        quantile: float = 1.0,
        blur_sigma: float = 0.0,
    ) -> None:
        super().__init__()
        self.quantile = quantile
        # until fitted: the likelihood of a latent 0 under a flow that changes no volume
        self.register_buffer("peaks", paddle.full([len(level_sizes)], LOG_PEAK, "float32"))
        self.to_map = nn.LayerList(
            [
                Upsampler(size, input_size, align_corners=True, blur_sigma=blur_sigma)
                for size in level_sizes
            ]
        )

    def forward(self, latents: list[Tensor], log_dets: list[Tensor]) -> tuple[Tensor, Tensor]:
        normal = []
        for level, likelihood in enumerate(log_likelihoods(latents, log_dets)):
            short_of_peak = nn.functional.relu(self.peaks[level] - likelihood.squeeze(1))
            normal.append(self.to_map[level](paddle.exp(-short_of_peak)))  # (B, H, W)
        anomaly_map = float(len(normal)) - sum(normal[1:], normal[0])
        return anomaly_map.unsqueeze(1), anomaly_map.max([1, 2])

    @paddle.no_grad()
    def fit(self, batches: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        seen: list[list[np.ndarray]] = [[] for _ in self.to_map]
        for latents, log_dets in batches:
            for level, likelihood in enumerate(log_likelihoods(latents, log_dets)):
                seen[level].append(likelihood.numpy().ravel())
        if not seen[0]:
            raise ValueError("no images to fit the scorer on: give at least one batch")
        peaks = [np.quantile(np.concatenate(values), self.quantile) for values in seen]
        self.peaks.set_value(np.array(peaks, np.float32))


def maps_relative_to_set(
    likelihoods: Sequence[np.ndarray], input_size: Size
) -> tuple[np.ndarray, np.ndarray]:
    """Return maps (N, H, W) and scores (N,) relative to the given images, as published figures are.

    `likelihoods` holds ℓ of every level, (N, h_i, w_i), float64. Over a whole test set this is the
    official scoring, over each batch anomalib's. A score then depends on the other images: only
    for comparison.
    """
    total = np.zeros((likelihoods[0].shape[0], *input_size))
    for level in likelihoods:
        relative = np.exp(level.astype(np.float64) - level.max())
        rows, columns = (
            upsampling_matrix(level.shape[axis + 1], input_size[axis], align_corners=True)
            for axis in (0, 1)
        )
        total += rows @ relative @ columns.T
    maps = total.max() - total
    return maps, maps.max((1, 2))
