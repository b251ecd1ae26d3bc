"""CFLOW-AD (Gudovskiy et al., arXiv 2107.12571): a flow of every fibre, given its position.

A fibre is the channel vector of one position of one level. Computed over whole maps as 1×1
convolutions, or over any set of fibres as the reference trains. N fibres, P channels of the code.

Names of weights, with d = C − ⌊C/2⌋ + P, and what they are called in level l, block k of the
official decoders and of anomalib (`decoders.{l}.module_list.{k}.`):

    levels.{l}.{k}.affine.scale, .offset      (C,)      global_scale, global_offset, 1×C there
    levels.{l}.{k}.affine.rotation            (C, C)    w_perm, soft: y_i = Σ_j w_perm[i, j]·v_j
    levels.{l}.{k}.affine.permutation         (C,)      w_perm, hard: index of the 1 in row i
    levels.{l}.{k}.subnet.first.weight        (2d, d−P) subnet.0.weight[:, :d−P]
    levels.{l}.{k}.subnet.first.code_weight   (2d, P)   subnet.0.weight[:, d−P:]
    levels.{l}.{k}.subnet.first.bias          (2d,)     subnet.0.bias
    levels.{l}.{k}.subnet.second.weight, .bias          subnet.2.weight, subnet.2.bias
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from . import ops
from .base import FeaturePyramid, Flow
from .layers import CouplingStep
from .permutations import draw_permutation
from .position import PositionCode
from .subnets import parameter

REMAINDERS = ("drop", "merge")
LOG_PEAK = -0.5 * math.log(2.0 * math.pi)  # ℓ of a latent 0 without volume change


class CFlow(Flow):
    """Run `steps` conditional coupling steps over the fibres of every level.

    `code_channels` is P, a multiple of 4; 0 means no condition (the official `freia-flow`).
    `permute`: `soft` rotates between steps (official), `hard` permutes (anomalib).
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        steps: int,
        code_channels: int,
        permute: str,
        clamp: str,
        alpha: float,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        self.latent_channels = list(channels)
        self.conditional = code_channels > 0
        self._folded = False
        self.codes = nn.LayerList()
        self.levels = nn.LayerList()

        def subnet(c_in: int, c_out: int) -> nn.Layer:
            return FiberSubnet(c_in, c_out, code_channels=code_channels, rng=rng)

        def step(count: int) -> CouplingStep:
            return CouplingStep(
                draw_permutation(permute, count, rng), subnet, coupling="one_sided", clamp=clamp,
                alpha=alpha, global_scale="softplus",
            )  # fmt: skip

        for count, size in zip(channels, sizes, strict=True):
            if self.conditional:
                self.codes.append(PositionCode(code_channels, size))
            self.levels.append(nn.LayerList([step(count) for _ in range(steps)]))

    def forward(self, features: FeaturePyramid) -> tuple[FeaturePyramid, list[Tensor]]:
        latents, log_dets = [], []
        for index, feature in enumerate(features):
            z, log_det = self._run(index, ops.enter(feature), self._code(index))
            latents.append(ops.leave(z))  # (B, C, H, W)
            log_dets.append(ops.leave(log_det))  # (B, 1, H, W)
        return latents, log_dets

    def _code(self, index: int) -> Tensor | None:
        return ops.enter(self.codes[index]()) if self.conditional else None

    def _run(self, index: int, x: Tensor, code: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = 0.0
        for step in self.levels[index]:
            x, step_log_det = step(x, code)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, latents: FeaturePyramid) -> FeaturePyramid:
        features = []
        for index, level in enumerate(self.levels):
            x, code = ops.enter(latents[index]), self._code(index)
            for step in reversed(level):
                x = step.inverse(x, code)
            features.append(ops.leave(x))
        return features

    def loss(self, latents: FeaturePyramid, log_dets: list[Tensor], share: float = 1.0) -> Tensor:
        """Return Σ over levels of the mean over fibres of −ln σ(ℓ): a scalar."""
        terms = []
        for likelihood in log_likelihoods(latents, log_dets):  # (B, 1, H, W)
            total = F.log_sigmoid(likelihood).sum(3).sum(2).sum(1).sum()
            terms.append(-total * (share / float(likelihood.size)))
        return sum(terms[1:], terms[0])

    def fiber_loss(self, level: int, fibers: Tensor, codes: Tensor | None) -> Tensor:
        """Return the mean of −ln σ(ℓ) over fibres (N, C) with position codes (N, P): a scalar."""
        return -F.log_sigmoid(self.fiber_log_likelihood(level, fibers, codes)).mean()

    def fiber_log_likelihood(self, level: int, fibers: Tensor, codes: Tensor | None) -> Tensor:
        """Return ℓ of fibres (N, C) with position codes (N, P), in nats per dimension: (N,)."""
        if self._folded:
            raise RuntimeError("folded for export: the codes of whole maps are built in")
        given = codes.unsqueeze([0, 1]) if codes is not None else None  # (1, 1, N, P)
        z, log_det = self._run(level, fibers.unsqueeze([0, 1]), given)
        (likelihood,) = log_likelihoods([ops.leave(z)], [ops.leave(log_det)])  # (1, 1, 1, N)
        return likelihood.reshape([-1])

    def fiber_losses(
        self,
        features: FeaturePyramid,
        count: int,
        remainder: str,
        rng: np.random.Generator,
        *,
        first: int = 0,
        images: int | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (level, loss) for batches of `count` shuffled fibres, to step after each one.

        The fibres left over at a level are dropped (official), which raises ValueError where there
        are fewer than `count`, or merged into its last batch (anomalib). The features may be those
        of a part of a batch of so many `images`, from number `first` on: the losses of all parts
        add up to those of the batch.
        """
        for level, feature in enumerate(features):
            rows = feature.transpose([0, 2, 3, 1]).reshape([-1, feature.shape[1]])  # (B·H·W, C)
            positions = feature.shape[2] * feature.shape[3]
            codes = self._code_rows(level)
            total = (images or feature.shape[0]) * positions
            for batch in _fiber_batches(total, count, remainder, rng):
                chosen = batch - first * positions
                chosen = chosen[(chosen >= 0) & (chosen < rows.shape[0])]
                share = len(chosen) / len(batch)
                chosen = chosen if len(chosen) else np.zeros(1, np.int64)  # share 0
                fibers = paddle.gather(rows, paddle.to_tensor(chosen))
                given = None
                if codes is not None:
                    given = paddle.gather(codes, paddle.to_tensor(chosen % positions))
                yield level, self.fiber_loss(level, fibers, given) * share

    def _code_rows(self, level: int) -> Tensor | None:
        code = self._code(level)
        return None if code is None else code.reshape([-1, code.shape[3]])  # (H·W, P)

    def fold(self) -> None:
        super().fold()
        for index, level in enumerate(self.levels):
            code = self._code(index)
            for step in level:
                if code is not None:
                    step.subnet.first.fold(code)
        self._folded = True


def log_likelihoods(latents: FeaturePyramid, log_dets: list[Tensor]) -> list[Tensor]:
    """Return ℓ of every fibre, its log-likelihood in nats per dimension, (B, 1, H_i, W_i)."""
    values = []
    for level, z in enumerate(latents):
        energy = 0.5 * (z * z).sum(1, keepdim=True)
        values.append((log_dets[level] - energy) / float(z.shape[1]) + LOG_PEAK)
    return values


def _fiber_batches(
    total: int, count: int, remainder: str, rng: np.random.Generator
) -> list[np.ndarray]:
    full = total // count
    if full == 0 and remainder == "drop":
        raise ValueError(
            f"a level has {total} fibres in a batch of images, fewer than a fibre batch of "
            f"{count}: take more images, smaller fibre batches, or merge the remainder"
        )
    order = rng.permutation(total)
    batches = [order[i * count : (i + 1) * count] for i in range(full)]
    if remainder == "merge":
        batches[-1:] = [order[max(full - 1, 0) * count :]]
    return batches


class FiberSubnet(nn.Layer):
    """Linear, ReLU, linear over the channels of every position, given its code."""

    def __init__(
        self, c_in: int, c_out: int, *, code_channels: int, rng: np.random.Generator
    ) -> None:
        super().__init__()
        hidden = 2 * (c_in + code_channels)  # 2: official code
        self.first = FiberLinear(c_in, hidden, rng, code_channels)
        self.second = FiberLinear(hidden, c_out, rng)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        return self.second(F.relu(self.first(x, code)))


class FiberLinear(nn.Layer):
    """Map every fibre, y = W·x + V·code + b; V·code is the same for all images of a batch.

    Weights and bias start uniformly in ±1/√fan_in, as in PyTorch.
    """

    def __init__(
        self, c_in: int, c_out: int, rng: np.random.Generator, code_channels: int = 0
    ) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(c_in + code_channels)
        self.weight = parameter(self, rng.uniform(-bound, bound, (c_out, c_in)))
        if code_channels:
            self.code_weight = parameter(self, rng.uniform(-bound, bound, (c_out, code_channels)))
        self.bias = parameter(self, rng.uniform(-bound, bound, c_out))
        self._shift: Tensor | None = None

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        if code is None:
            return ops.mix(x, self.weight, self.bias)
        if self._shift is not None:
            return ops.mix(x, self.weight) + ops.enter(self._shift)
        return ops.mix(x, self.weight) + ops.mix(code, self.code_weight, self.bias)

    def fold(self, code: Tensor) -> None:
        """Replace V·code + b by a constant map, for export; `code` is in the flow's layout."""
        with paddle.no_grad():
            shift = ops.leave(ops.mix(code, self.code_weight, self.bias)).detach()
        self.register_buffer("folded_shift", shift, persistable=False)  # (1, C_out, H, W)
        self._shift = self.folded_shift
