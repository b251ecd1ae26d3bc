"""FastFlow (Yu et al., arXiv 2111.07677): an independent 2-D flow on every backbone level.

Two networks go by this name, and both are here: one-sided steps as in the PyTorch
re-implementations, two-sided steps as in FastFlow-Paddle.
"""

from collections.abc import Sequence

import numpy as np
from paddle import Tensor, nn

from . import ops
from .base import FeaturePyramid, Flow, dimensions, negative_log_likelihood
from .layers import CouplingStep, Subnet, feature_norm
from .permutations import draw_permutation
from .subnets import ConvSubnet


class FastFlow(Flow):
    """Normalise each level, then run `steps` coupling steps over it.

    Kernels alternate 3, 1, 3, … unless `conv3x3_only`. `permute`: `hard` permutes between steps,
    `soft` rotates. `loss_norm`: `per_element` divides each level's likelihood by its number of
    values, `none` adds nats per image as they are.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        steps: int,
        hidden_ratio: float,
        conv3x3_only: bool,
        coupling: str,
        clamp: str,
        alpha: float,
        norm: str,
        norm_momentum: float,
        global_scale: str,
        loss_norm: str,
        init: str,
        rng: np.random.Generator,
        permute: str = "hard",
    ) -> None:
        super().__init__()
        self.latent_channels = list(channels)
        self.loss_norm = loss_norm
        self.norms = nn.LayerList()
        self.levels = nn.LayerList()
        for count, size in zip(channels, sizes, strict=True):
            self.norms.append(feature_norm(norm, count, size, norm_momentum))
            level = nn.LayerList()
            for step in range(steps):
                kernel = 3 if conv3x3_only or step % 2 == 0 else 1
                level.append(
                    CouplingStep(
                        draw_permutation(permute, count, rng),
                        _subnet_maker(hidden_ratio, kernel, init, rng),
                        coupling=coupling,
                        clamp=clamp,
                        alpha=alpha,
                        global_scale=global_scale,
                    )
                )
            self.levels.append(level)

    def forward(self, features: FeaturePyramid) -> tuple[FeaturePyramid, list[Tensor]]:
        latents, log_dets = [], []
        for index, feature in enumerate(features):
            x = ops.enter(self.norms[index](feature))
            log_det = 0.0
            for step in self.levels[index]:
                x, step_log_det = step(x)
                log_det = log_det + step_log_det
            latents.append(ops.leave(x))  # (B, C, H, W)
            log_dets.append(ops.leave(log_det))  # (B, 1, H, W)
        return latents, log_dets

    def inverse(self, latents: FeaturePyramid) -> FeaturePyramid:
        features = []
        for level, latent in zip(self.levels, latents, strict=True):
            x = ops.enter(latent)
            for step in reversed(level):
                x = step.inverse(x)
            features.append(ops.leave(x))
        return features

    def loss(self, latents: FeaturePyramid, log_dets: list[Tensor], share: float = 1.0) -> Tensor:
        terms = [total.mean() for total in negative_log_likelihood(latents, log_dets)]
        if self.loss_norm == "per_element":
            sizes = dimensions(latents)
            terms = [term / size for term, size in zip(terms, sizes, strict=True)]
        return sum(terms[1:], terms[0]) * share


def _subnet_maker(ratio: float, kernel: int, init: str, rng: np.random.Generator) -> Subnet:
    def make(c_in: int, c_out: int) -> nn.Layer:
        hidden = int(c_in * ratio)
        return ConvSubnet(c_in, c_out, hidden=hidden, kernel=kernel, init=init, rng=rng)

    return make
