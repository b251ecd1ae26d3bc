"""FastFlow's scorer: the mean of the levels' likelihood maps, and its maximum."""

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

from .base import Scorer
from .maps import Size, Upsampler, average

SCORES = ("probability", "energy", "nll")


class FastFlowScorer(Scorer):
    """Turn each level's mean squared latent m into a map, up-sample, average; score = maximum.

    `probability`: 1 − exp(−m/2), from 0 to 1; `energy`: m/2, which does not saturate; `nll`:
    m/2 − log|det J|/C, the likelihood that training maximises, in nats per dimension.
    The map is smoothed by a Gaussian of `blur_sigma` input pixels; the score is taken before that
    (`sharp`) or from the smoothed map (`smooth`).
    """

    def __init__(
        self,
        level_sizes: Sequence[Size],
        input_size: Size,
        *,
        score: str,
        align_corners: bool,
        blur_sigma: float,
        score_from: str = "sharp",
    ) -> None:
        super().__init__()
        self.score = score
        self.two_maps = blur_sigma > 0 and score_from == "sharp"

        def upsamplers(sigma: float) -> nn.LayerList:
            return nn.LayerList(
                [
                    Upsampler(size, input_size, align_corners=align_corners, blur_sigma=sigma)
                    for size in level_sizes
                ]
            )

        self.to_map = upsamplers(blur_sigma)
        self.to_sharp = upsamplers(0.0) if self.two_maps else nn.LayerList()

    def forward(self, latents: list[Tensor], log_dets: list[Tensor]) -> tuple[Tensor, Tensor]:
        levels = [self._level_map(z, log_dets[level]) for level, z in enumerate(latents)]
        smooth = average([self.to_map[i](level) for i, level in enumerate(levels)])  # (B, H, W)
        sharp = smooth
        if self.two_maps:
            sharp = average([self.to_sharp[i](level) for i, level in enumerate(levels)])
        return smooth.unsqueeze(1), sharp.max([1, 2])

    def _level_map(self, z: Tensor, log_det: Tensor) -> Tensor:
        half_energy = (z * z).sum(1) * (0.5 / z.shape[1])  # (B, h, w)
        if self.score == "probability":
            return 1.0 - paddle.exp(-half_energy)
        if self.score == "nll":
            return half_energy - log_det.squeeze(1) / float(z.shape[1])
        return half_energy
