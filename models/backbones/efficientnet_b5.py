"""EfficientNet-B5: squeeze-and-excitation, swish, and the padding of either reference code."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import paddle.nn.functional as F
from paddle import Tensor, nn

from utils.errors import UserError

from . import names
from .base import Backbone, Taps
from .names import Arrays

Padding = Literal["tf_static", "symmetric"]

EPSILON = 1e-3  # of the batch norms, as in TensorFlow's EfficientNet
STEM_CHANNELS = 48
TRAINED_SIZE = 456  # pixels per side; efficientnet_pytorch fixes the padding to this size
SQUEEZE = 0.25  # channels inside squeeze-and-excitation per input channel of the block
# kernel, stride of the first block, expansion, output channels, blocks
# (Tan & Le 2019, table 1, scaled by 1.6 in width and 2.2 in depth)
STAGES = (
    (3, 1, 1, 24, 3),
    (3, 2, 6, 40, 5),
    (5, 2, 6, 64, 5),
    (3, 2, 6, 128, 7),
    (5, 1, 6, 176, 7),
    (5, 2, 6, 304, 9),
    (3, 1, 6, 512, 3),
)


class BlockShape(NamedTuple):
    """Describe a block: number of its stage, place in it, and what the convolutions need.

    `size` is that of its input in training, in pixels per side.
    """

    stage: int
    place: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int
    size: int


def block_shapes() -> Iterator[BlockShape]:
    """Yield the shapes of all 39 blocks."""
    inputs, size = STEM_CHANNELS, -(-TRAINED_SIZE // 2)
    for stage, (kernel, first_stride, expansion, outputs, repeats) in enumerate(STAGES, 1):
        for place in range(repeats):
            stride = first_stride if place == 0 else 1
            yield BlockShape(stage, place, inputs, outputs, kernel, stride, expansion, size)
            inputs, size = outputs, -(-size // stride)


def edges(mode: Padding, size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and behind an axis: TensorFlow's "same" at `size`, or k // 2."""
    if mode == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class ConvNorm(nn.Layer):
    """Convolve with `pad` zeros before and behind each axis, normalise, and optionally swish."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        pad: tuple[int, int] = (0, 0),
        swish: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2D(
            inputs, outputs, kernel, stride, [*pad, *pad], groups=groups, bias_attr=False
        )
        self.norm = nn.BatchNorm2D(outputs, epsilon=EPSILON)
        self.activation = nn.Silu() if swish else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class SqueezeExcite(nn.Layer):
    """Scale every channel by a gate computed from the means of all (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2D(channels, squeezed, 1)
        self.expand = nn.Conv2D(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1)  # (B, C, 1, 1)
        return x * F.sigmoid(self.expand(F.silu(self.reduce(means))))


class Block(nn.Layer):
    """Expand, convolve per channel, squeeze and excite, project; add the input if shapes agree."""

    def __init__(self, shape: BlockShape, padding: Padding) -> None:
        super().__init__()
        inputs, kernel, stride = shape.inputs, shape.kernel, shape.stride
        width = inputs * shape.expansion
        pad = edges(padding, shape.size, kernel, stride)
        self.expand = ConvNorm(inputs, width) if shape.expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, width, pad=pad)
        self.squeeze = SqueezeExcite(width, max(1, int(inputs * SQUEEZE)))
        self.project = ConvNorm(width, shape.outputs, swish=False)
        self.residual = stride == 1 and inputs == shape.outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class EfficientNetB5(Backbone):
    """Tap the last block of stages 1, 2, 3, 5 and 6, behind the residual sum.

    With `padding` tf_static a convolution pads as TensorFlow would for 456×456 images, whatever
    the input (efficientnet_pytorch 0.7, CS-Flow); with symmetric it pads k // 2 (torchvision,
    anomalib). The weights are the same.
    """

    name = "efficientnet_b5"
    taps: ClassVar[Taps] = {2: (3, 24), 4: (8, 40), 8: (13, 64), 16: (27, 176), 32: (36, 304)}
    numbered_keys = r"blocks\."
    first_numbered_step = 1  # step 0 is the stem
    head_keys = (*names.EFFICIENTNET_HEAD, "_conv.", "features.8.")

    def __init__(self, strides: Sequence[int], padding: Padding = "tf_static") -> None:
        if padding not in get_args(Padding):
            raise UserError(
                f"padding {padding!r} of {self.name} is not one of {', '.join(get_args(Padding))}"
            )
        super().__init__(strides)
        pad = edges(padding, TRAINED_SIZE, 3, 2)
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, 2, pad=pad)
        shapes = list(block_shapes())[: self.last_step]
        self.blocks = nn.LayerList([Block(shape, padding) for shape in shapes])
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return [self.stem, *self.blocks]

    def translate(self, arrays: Arrays) -> Arrays:
        """Take the names of efficientnet_pytorch, timm, PaddleClas and torchvision."""
        return names.rename(arrays, own_names())


# Layers of a block of PaddleClas, in the order of `names.BLOCK`.
PADDLE_CLAS = (
    "_ecn._conv._conv._conv", "_ecn._conv._bn", "_dcn._conv._conv._conv", "_dcn._conv._bn",
    "_se._conv1._conv", "_se._conv2._conv", "_pcn._conv._conv._conv", "_pcn._conv._bn",
)  # fmt: skip


def own_names() -> names.Names:
    """Return the names of the layers in other projects' files -> the names here."""
    stem = ("stem.conv", "stem.norm")
    known = names.efficientnet([repeats for *_, repeats in STAGES])
    known |= names.pair("_ef._conv_stem._conv.", ("_conv._conv", "_bn"), "", stem)
    known |= names.pair("features.0.", names.CONV_NORM, "", stem)
    for number, shape in enumerate(block_shapes()):
        own = f"blocks.{number}."
        # PaddleClas's own quirk: two names for a block, and a dot at the end of it
        group = "_blocks" if shape.place == 0 else "block"
        known |= names.pair(f"_ef.{group}.{number}..", PADDLE_CLAS, own, names.BLOCK)
        layers = names.torchvision_block(shape.expansion > 1, squeezes=True)
        known |= names.pair(f"features.{shape.stage}.{shape.place}.", layers, own, names.BLOCK)
    return known
