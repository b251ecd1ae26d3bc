"""CS-Flow (Rudolph et al., arXiv 2110.02855): one flow over three scales of one backbone tap.

The three maps are transformed together: the networks inside a coupling block are convolutional
and exchange information between neighbouring scales.
"""

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor, nn

from . import ops
from .base import FeaturePyramid, Flow, dimensions, negative_log_likelihood
from .layers import CLAMPS
from .subnets import Conv, parameter, scale_output

SCALES = 3  # the image at its full size, a half and a quarter
PERMUTATIONS = ("official", "anomalib")
_KERNEL = 3
_SLOPE = 0.1  # of LeakyReLU
_LIMIT = 1e6  # the official code clips every block's output here, outside the log-determinant


class CSFlow(Flow):
    """Run `blocks` coupling blocks, each after a fixed permutation of the channels of every scale.

    `channels` and `sizes` are of the three scales, finest first: the same number of channels, and
    maps each half the one before. `alpha` bounds the log-scales, hidden maps have `hidden`
    channels. Kernels are 3×3, in the last block `last_kernel`. Without `use_gamma` the networks'
    outputs are taken as they are; with it they start at 0: an untrained flow only permutes.
    Raise ValueError for other channels or sizes.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        blocks: int,
        hidden: int,
        alpha: float,
        permutation: str,
        rng: np.random.Generator,
        last_kernel: int = 5,
        use_gamma: bool = True,
    ) -> None:
        super().__init__()
        self.latent_channels = list(channels)
        _check_scales(channels, sizes)
        self.blocks = nn.LayerList()
        for index in range(blocks):
            self.blocks.append(
                CrossScaleCoupling(
                    block_permutations(index, channels[0], permutation),
                    sizes,
                    hidden=hidden,
                    kernel=last_kernel if index == blocks - 1 else _KERNEL,
                    alpha=alpha,
                    use_gamma=use_gamma,
                    rng=rng,
                )
            )

    def forward(self, features: FeaturePyramid) -> tuple[FeaturePyramid, list[Tensor]]:
        maps = [ops.enter(feature) for feature in features]
        totals = [0.0] * SCALES
        for block in self.blocks:
            maps, log_dets = block(maps)
            totals = [totals[s] + log_dets[s] for s in range(SCALES)]
        return [ops.leave(z) for z in maps], [ops.leave(total) for total in totals]

    def inverse(self, latents: FeaturePyramid) -> FeaturePyramid:
        maps = [ops.enter(z) for z in latents]
        for block in reversed(self.blocks):
            maps = block.inverse(maps)
        return [ops.leave(x) for x in maps]

    def fold(self) -> None:
        super().fold()
        for layer in self.sublayers():
            if isinstance(layer, CrossScaleNet):
                layer.fold()

    def loss(self, latents: FeaturePyramid, log_dets: list[Tensor], share: float = 1.0) -> Tensor:
        totals = negative_log_likelihood(latents, log_dets)
        return sum(totals[1:], totals[0]).mean() * (share / float(sum(dimensions(latents))))


class CrossScaleCoupling(nn.Layer):
    """Permute, then transform each part of the channels by networks of the other, at all scales.

    x1 ← x1·exp(s) + t with (s, t) of all scales from x2, then x2 ← x2·exp(s') + t' with (s', t')
    from the new x1; s = α·0.636·atan(·/α). Tensors are in the flow's layout.
    """

    def __init__(
        self,
        permutations: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        *,
        hidden: int,
        kernel: int,
        alpha: float,
        use_gamma: bool,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        first = len(permutations[0]) // 2
        second = len(permutations[0]) - first  # the larger part when the number is odd
        self.parts = (first, second)
        self.alpha = alpha
        for scale, order in enumerate(permutations):
            self.register_buffer(f"permutation{scale}", paddle.to_tensor(order.astype(np.int64)))

        def network(c_in: int, c_out: int) -> CrossScaleNet:
            return CrossScaleNet(
                c_in, 2 * c_out, sizes, hidden=hidden, kernel=kernel, use_gamma=use_gamma,
                rng=rng,
            )  # fmt: skip

        self.to_first = network(second, first)
        self.to_second = network(first, second)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return y and the log-determinants of every position, both per scale."""
        axis = ops.channel_axis()
        permuted = [paddle.gather(maps[s], self._order(s), axis=axis) for s in range(SCALES)]
        halves = [ops.split(x, self.parts) for x in permuted]
        first, second = [h[0] for h in halves], [h[1] for h in halves]
        first, log_dets = self._move(first, self.to_first(second))
        second, changes = self._move(second, self.to_second(first))
        joined = [ops.concat((first[s], second[s])) for s in range(SCALES)]
        clipped = [paddle.clip(y, -_LIMIT, _LIMIT) for y in joined]
        return clipped, [log_dets[s] + changes[s] for s in range(SCALES)]

    def inverse(self, maps: list[Tensor]) -> list[Tensor]:
        """Return x such that forward(x) gives y."""
        halves = [ops.split(y, self.parts) for y in maps]
        first, second = [h[0] for h in halves], [h[1] for h in halves]
        second = self._move_back(second, self.to_second(first))
        first = self._move_back(first, self.to_first(second))
        joined = [ops.concat((first[s], second[s])) for s in range(SCALES)]
        back = [paddle.argsort(self._order(s)) for s in range(SCALES)]
        return [paddle.gather(joined[s], back[s], axis=ops.channel_axis()) for s in range(SCALES)]

    def _order(self, scale: int) -> Tensor:
        return getattr(self, f"permutation{scale}")

    def _scale_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = ops.split(raw, (raw.shape[ops.channel_axis()] // 2,) * 2)
        return CLAMPS["atan"](log_scale, self.alpha), shift

    def _move(self, maps: list[Tensor], raw: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        moved, log_dets = [], []
        for scale in range(SCALES):
            log_scale, shift = self._scale_shift(raw[scale])
            moved.append(maps[scale] * paddle.exp(log_scale) + shift)
            log_dets.append(ops.channel_sum(log_scale))
        return moved, log_dets

    def _move_back(self, maps: list[Tensor], raw: list[Tensor]) -> list[Tensor]:
        restored = []
        for scale in range(SCALES):
            log_scale, shift = self._scale_shift(raw[scale])
            restored.append((maps[scale] - shift) * paddle.exp(-log_scale))
        return restored


class CrossScaleNet(nn.Layer):
    """Predict the raw log-scales and shifts of all scales from one part of their channels.

    Each scale has a hidden map; an output adds the convolutions of its own scale's, of the
    doubled next coarser and, at stride 2, of the next finer one, and is damped by a learned γ.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        sizes: Sequence[tuple[int, int]],
        *,
        hidden: int,
        kernel: int,
        use_gamma: bool,
        rng: np.random.Generator,
    ) -> None:
        super().__init__()

        def convs(count: int, c_from: int, c_to: int, stride: int = 1) -> nn.LayerList:
            return nn.LayerList(
                [Conv(c_from, c_to, kernel, "torch", rng, stride) for _ in range(count)]
            )

        self.enter = convs(SCALES, c_in, hidden)
        self.direct = convs(SCALES, hidden, c_out)
        self.up = convs(SCALES - 1, hidden, c_out)  # 1 → 0, 2 → 1
        self.down = convs(SCALES - 1, hidden, c_out, stride=2)  # 0 → 1, 1 → 2
        self.doubling = nn.LayerList([Doubling(size) for size in sizes[1:]])
        self.gamma = None
        if use_gamma:
            self.gamma = nn.ParameterList([parameter(self, np.zeros(1)) for _ in range(SCALES)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        hidden = [ops.leaky_relu(self.enter[s](maps[s]), _SLOPE) for s in range(SCALES)]
        outputs = []
        for scale in range(SCALES):
            out = self.direct[scale](hidden[scale])
            if scale < SCALES - 1:
                out = out + self.up[scale](self.doubling[scale](hidden[scale + 1]))
            if scale > 0:
                out = out + self.down[scale - 1](hidden[scale - 1])
            outputs.append(out if self.gamma is None else out * self.gamma[scale])
        return outputs

    def fold(self) -> None:
        """Move γ into the last convolutions, for export."""
        if self.gamma is None:
            return
        for scale, gamma in enumerate(self.gamma):
            scale_output(self.direct[scale], gamma)
            if scale < SCALES - 1:
                scale_output(self.up[scale], gamma)
            if scale > 0:
                scale_output(self.down[scale - 1], gamma)
        self.gamma = None


class Doubling(nn.Layer):
    """Double the size of maps bilinearly (align_corners off), by products with constant matrices.

    The kernel of Paddle's own interpolation fails on Paddle Inference with oneDNN.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        for name, length in zip(("rows", "columns"), size, strict=True):
            matrix = paddle.to_tensor(doubling_matrix(length).astype(np.float32))
            self.register_buffer(name, matrix, persistable=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.resample(x, self.rows, self.columns)


def doubling_matrix(length: int) -> np.ndarray:
    """Return the (2·length, length) matrix of bilinear interpolation, weights ¾ and ¼."""
    target = np.arange(2 * length)
    near = target // 2
    far = np.clip(near + np.where(target % 2 == 1, 1, -1), 0, length - 1)
    identity = np.eye(length)
    return 0.75 * identity[near] + 0.25 * identity[far]


def block_permutations(block: int, channels: int, form: str) -> list[np.ndarray]:
    """Return the orders (channels,) of a block's scales; output channel i is input order[i].

    `official`: three draws of NumPy's legacy generator seeded with the number of the block.
    `anomalib`: one draw of the new generator with that seed, the same for all scales.
    """
    if form == "anomalib":
        return [np.random.default_rng(block).permutation(channels)] * SCALES
    legacy = np.random.RandomState(block)
    return [legacy.permutation(channels) for _ in range(SCALES)]


def _check_scales(channels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
    if len(channels) != SCALES or len(set(channels)) > 1:
        raise ValueError(f"channels {list(channels)}: CS-Flow needs {SCALES} maps of one tap")
    height, width = sizes[-1]
    if [tuple(size) for size in sizes] != [(height * p, width * p) for p in (4, 2, 1)]:
        raise ValueError(
            f"sizes {[tuple(size) for size in sizes]}: CS-Flow needs {SCALES} maps, each half the "
            "one before; choose an input size that 4 × the tap's stride divides"
        )
