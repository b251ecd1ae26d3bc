"""EfficientNet-B5: squeeze-and-excitation, swish, and the padding of either reference code."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import paddle.nn.functional as F
from paddle import Tensor, nn

from utils.errors import UserError

from .base import Backbone, Taps

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
    head_keys = ("_conv_head.", "_bn1.", "_fc.", "_conv.", "features.8.", "classifier.")

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

    def translate(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take names of efficientnet_pytorch, PaddleClas and torchvision."""
        own = own_names()
        renamed = {}
        for key, array in arrays.items():
            layer, dot, leaf = key.rpartition(".")
            renamed[own.get(layer, layer) + dot + leaf] = array
        return renamed


# layers of a block: here, efficientnet_pytorch, PaddleClas, torchvision
LAYER_NAMES = (
    ("expand.conv", "_expand_conv", "_ecn._conv._conv._conv", "0.0"),
    ("expand.norm", "_bn0", "_ecn._conv._bn", "0.1"),
    ("depthwise.conv", "_depthwise_conv", "_dcn._conv._conv._conv", "1.0"),
    ("depthwise.norm", "_bn1", "_dcn._conv._bn", "1.1"),
    ("squeeze.reduce", "_se_reduce", "_se._conv1._conv", "2.fc1"),
    ("squeeze.expand", "_se_expand", "_se._conv2._conv", "2.fc2"),
    ("project.conv", "_project_conv", "_pcn._conv._conv._conv", "3.0"),
    ("project.norm", "_bn2", "_pcn._conv._bn", "3.1"),
)
STEM_NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_ef._conv_stem._conv._conv._conv": "stem.conv",
    "_ef._conv_stem._conv._bn": "stem.norm",
    "features.0.0": "stem.conv",
    "features.0.1": "stem.norm",
}


def own_names() -> dict[str, str]:
    """Return the names of the layers in other projects' files -> the names here."""
    names = dict(STEM_NAMES)
    for number, shape in enumerate(block_shapes()):
        # PaddleClas's own quirk: two names for a block, and a dot at the end of it
        group = "_blocks" if shape.place == 0 else "block"
        for own, lukemelas, paddle_clas, torchvision in LAYER_NAMES:
            first, _, layer = torchvision.partition(".")
            position = int(first) - (shape.expansion == 1)  # nothing stands for no expansion
            for foreign in (
                f"_blocks.{number}.{lukemelas}",
                f"_ef.{group}.{number}..{paddle_clas}",
                f"features.{shape.stage}.{shape.place}.block.{position}.{layer}",
            ):
                names[foreign] = f"blocks.{number}.{own}"
    return names
