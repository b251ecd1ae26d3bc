"""EfficientNet-Lite0: no squeeze-excite, ReLU6, linear projections, TensorFlow padding."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from paddle import Tensor, nn

from utils.errors import UserError

from . import names
from .base import Backbone, Taps
from .names import Arrays

EPSILON = 1e-3  # of the batch norms, as in TensorFlow's EfficientNet
# kernel, stride of the first block, expansion, output channels, blocks
# (Tan & Le 2019, table 1; the Lite variant keeps the stem and the head unscaled)
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class ConvNorm(nn.Layer):
    """Convolve with TensorFlow's "same" padding, normalise, and optionally apply ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        relu: bool,
    ) -> None:
        super().__init__()
        # "SAME" follows the size of the input and is uneven where that is even.
        padding = "SAME" if stride > 1 else kernel // 2
        self.conv = nn.Conv2D(
            inputs, outputs, kernel, stride, padding, groups=groups, bias_attr=False
        )
        self.norm = nn.BatchNorm2D(outputs, epsilon=EPSILON)
        self.activation = nn.ReLU6() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Block(nn.Layer):
    """Expand, convolve per channel, project; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = ConvNorm(inputs, width, 1, relu=True) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width, relu=True)
        self.project = ConvNorm(width, outputs, 1, relu=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def build_blocks(count: int) -> list[Block]:
    """Build the first `count` of the 16 blocks."""
    shapes = []
    inputs = 32  # channels of the stem
    for kernel, first_stride, expansion, outputs, repeats in STAGES:
        for stride in (first_stride, *[1] * (repeats - 1)):
            shapes.append((inputs, outputs, kernel, stride, expansion))
            inputs = outputs
    return [Block(*shape) for shape in shapes[:count]]


class EfficientNetLite0(Backbone):
    """Tap the projections of blocks 0, 2, 4, 10 and 15, before any activation.

    With `last_block` 14 the tap at stride 32 is that of block 14, with 192 channels.
    """

    name = "efficientnet_lite0"
    taps: ClassVar[Taps] = {2: (1, 16), 4: (3, 24), 8: (5, 40), 16: (11, 112), 32: (16, 320)}
    numbered_keys = r"blocks\."
    first_numbered_step = 1  # step 0 is the stem
    head_keys = names.EFFICIENTNET_HEAD
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, strides: Sequence[int], last_block: Literal[14, 15] = 15) -> None:
        if last_block not in (14, 15):
            raise UserError(f"last_block {last_block!r} of {self.name} is not one of 14, 15")
        super().__init__(strides, {**self.taps, 32: {14: (15, 192), 15: (16, 320)}[last_block]})
        self.stem = ConvNorm(3, 32, 3, 2, relu=True)
        self.blocks = nn.LayerList(build_blocks(self.last_step))
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return [self.stem, *self.blocks]

    def translate(self, arrays: Arrays) -> Arrays:
        """Take the names of efficientnet_pytorch and timm."""
        return names.rename(arrays, names.efficientnet([repeats for *_, repeats in STAGES]))
