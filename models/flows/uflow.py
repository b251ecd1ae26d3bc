"""U-Flow (Tailanian et al., arXiv 2211.12353): one U-shaped flow over all backbone levels.

Widths below: V channels enter a level, a of them go up to the next finer one, b = V - a stay.
"""

from collections.abc import Sequence

import numpy as np
from paddle import Tensor, nn

from . import ops
from .base import FeaturePyramid, Flow, negative_log_likelihood
from .layers import CouplingStep, Subnet, feature_norm
from .permutations import draw_permutation
from .subnets import ConvSubnet

LOSSES = ("per_sample", "batch_sum")
NORMS = ("layer", "none")


class UFlow(Flow):
    """Run `steps` coupling steps from the coarsest level to the finest, handing channels up.

    Each level but the finest splits: its first a = ⌊V/8⌋·4 channels are pixel-shuffled to double
    size and joined behind the next level's features, the other b are its latent. Kernels
    alternate 3, 1, 3, … `permute`: `hard` permutes between steps, `soft` rotates. `loss`:
    `per_sample` is the mean likelihood, un-normalised; `batch_sum` adds ½‖z‖² over the batch but
    averages the log-determinant, as the code of 2022 and anomalib.
    Raise ValueError for sizes that do not halve from level to level.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        steps: int,
        hidden_ratio: float,
        clamp: str,
        alpha: float,
        norm: str,
        loss: str,
        init: str,
        rng: np.random.Generator,
        permute: str = "hard",
    ) -> None:
        super().__init__()
        _check_sizes(sizes)
        self.loss_form = loss
        self.widths = level_widths(channels)
        self.latent_channels = [staying for _, staying in self.widths]
        self.norms = nn.LayerList()
        self.levels = nn.LayerList()
        for count, size, (going_up, staying) in zip(channels, sizes, self.widths, strict=True):
            self.norms.append(feature_norm(norm, count, size, momentum=0.9))
            level = nn.LayerList()
            for step in range(steps):
                level.append(
                    CouplingStep(
                        draw_permutation(permute, going_up + staying, rng),
                        _subnet_maker(hidden_ratio, 3 if step % 2 == 0 else 1, init, rng),
                        coupling="one_sided",
                        clamp=clamp,
                        alpha=alpha,
                        global_scale="softplus",
                    )
                )
            self.levels.append(level)

    def forward(self, features: FeaturePyramid) -> tuple[FeaturePyramid, list[Tensor]]:
        latents, log_dets = [], []
        from_below: tuple[Tensor, Tensor] | None = None  # channels and their log-determinant
        for index in range(len(self.levels) - 1, -1, -1):
            x = ops.enter(self.norms[index](features[index]))
            log_det = 0.0
            if from_below is not None:
                x = ops.concat((x, from_below[0]))
                log_det = from_below[1]
            for step in self.levels[index]:
                x, step_log_det = step(x)
                log_det = log_det + step_log_det
            going_up, staying = self.widths[index]
            if going_up > 0:
                up, x = ops.split(x, (going_up, staying))
                share, log_det = _divide(log_det, going_up, staying)
                from_below = (ops.pixel_shuffle(up), share)
            latents.append(ops.leave(x))  # (B, b, H, W)
            log_dets.append(ops.leave(log_det))  # (B, 1, H, W)
        return latents[::-1], log_dets[::-1]

    def inverse(self, latents: FeaturePyramid) -> FeaturePyramid:
        features = []
        up: Tensor | None = None
        for index, latent in enumerate(latents):
            x = ops.enter(latent)
            if up is not None:
                x = ops.concat((ops.pixel_unshuffle(up), x))
            for step in reversed(self.levels[index]):
                x = step.inverse(x)
            if index + 1 < len(latents):
                joined = self.widths[index + 1][0] // 4  # channels that came from below
                x, up = ops.split(x, (sum(self.widths[index]) - joined, joined))
            features.append(ops.leave(x))
        return features

    def loss(self, latents: FeaturePyramid, log_dets: list[Tensor], share: float = 1.0) -> Tensor:
        if self.loss_form == "per_sample":
            totals = negative_log_likelihood(latents, log_dets)
            return sum(totals[1:], totals[0]).mean() * share
        energies = negative_log_likelihood(latents, [0.0] * len(latents))  # (B,) each
        volumes = [log_det.sum(3).sum(2).sum(1) for log_det in log_dets]
        counted = sum(energies[1:], energies[0]).sum() * (1.0 if share > 0 else 0.0)
        return counted - sum(volumes[1:], volumes[0]).mean() * share


def level_widths(channels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (a, b) of every level, finest first: channels that go up, channels of the latent."""
    widths: list[tuple[int, int]] = []
    from_below = 0
    for index in range(len(channels) - 1, -1, -1):
        width = channels[index] + from_below
        going_up = width // 8 * 4 if index > 0 else 0
        widths.append((going_up, width - going_up))
        from_below = going_up // 4
    return widths[::-1]


def _divide(log_det: Tensor, going_up: int, staying: int) -> tuple[Tensor, Tensor]:
    """Share a level's log-determinant among its channels: the part that goes up, that which stays.

    Together they are what came in; at double size, four positions share what one had.
    """
    per_channel = log_det / float(going_up + staying)
    return ops.pixel_shuffle(ops.concat([per_channel * (going_up / 4)] * 4)), per_channel * staying


def _subnet_maker(ratio: float, kernel: int, init: str, rng: np.random.Generator) -> Subnet:
    def make(c_in: int, c_out: int) -> nn.Layer:
        hidden = int(c_in * ratio)
        return ConvSubnet(c_in, c_out, hidden=hidden, kernel=kernel, init=init, rng=rng)

    return make


def _check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    height, width = sizes[-1]
    powers = range(len(sizes) - 1, -1, -1)
    if [tuple(size) for size in sizes] != [(height * 2**p, width * 2**p) for p in powers]:
        raise ValueError(
            f"sizes {[tuple(size) for size in sizes]}: U-Flow needs maps that are each half the "
            "one before; choose consecutive strides, and an input size the coarsest one divides"
        )
