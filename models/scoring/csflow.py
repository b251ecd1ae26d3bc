"""CS-Flow's scorer: maps of the squared latents of the scales, and their mean or spread."""

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

from .base import Scorer
from .maps import Size, Upsampler

SCORES = ("mean", "std", "max")
MAPS = ("largest", "all")


class CSFlowScorer(Scorer):
    """Score all latents of an image together; show the channels' mean squared latent.

    Score: `mean` of ½·z² over all values of all scales, `std` its population standard deviation,
    `max` the maximum of the map. Map: `largest` scale alone, or the product of `all` (unit z⁶).
    Maps are up-sampled with align_corners off.
    """

    def __init__(
        self, level_sizes: Sequence[Size], input_size: Size, *, score: str, map_from: str
    ) -> None:
        super().__init__()
        self.score = score
        shown = level_sizes[:1] if map_from == "largest" else level_sizes
        self.to_map = nn.LayerList(
            [Upsampler(size, input_size, align_corners=False, blur_sigma=0.0) for size in shown]
        )

    def forward(self, latents: list[Tensor], log_dets: list[Tensor]) -> tuple[Tensor, Tensor]:
        shown = []
        for level, to_map in enumerate(self.to_map):
            z = latents[level]
            shown.append(to_map((z * z).sum(1) / float(z.shape[1])))  # (B, H, W)
        anomaly_map = shown[0]
        for other in shown[1:]:
            anomaly_map = anomaly_map * other
        if self.score == "max":
            return anomaly_map.unsqueeze(1), anomaly_map.max([1, 2])
        energies = [0.5 * z * z for z in latents]
        score = _mean(energies)  # (B, 1, 1, 1)
        if self.score == "std":
            centred = [energy - score for energy in energies]
            score = paddle.sqrt(_mean([value * value for value in centred]))
        return anomaly_map.unsqueeze(1), score.reshape([-1])


def _mean(levels: list[Tensor]) -> Tensor:
    """Return the mean over all values of all levels, (B, 1, 1, 1), summed axis by axis."""
    totals = [x.sum(1, keepdim=True).sum(3, keepdim=True).sum(2, keepdim=True) for x in levels]
    count = sum([x.shape[1] * x.shape[2] * x.shape[3] for x in levels])
    return sum(totals[1:], totals[0]) / float(count)
