"""MobileNetV2 and MobileNetV3-Large of paddle.vision, tapped at the last block of each stride."""

from collections.abc import Sequence
from typing import ClassVar

from paddle import Tensor, nn
from paddle.vision.models import MobileNetV2 as VisionMobileNetV2
from paddle.vision.models import MobileNetV3Large as VisionMobileNetV3Large

from . import names
from .base import Backbone, Taps
from .names import Arrays


class MobileNetV2(Backbone):
    """Tap the outputs of inverted residual blocks."""

    name = "mobilenet_v2"
    taps: ClassVar[Taps] = {2: (1, 16), 4: (3, 24), 8: (6, 32), 16: (13, 96), 32: (17, 320)}
    numbered_keys = r"features\."
    first_numbered_step = 0
    head_keys = ("classifier.", "conv_head.", "bn2.")
    stages = (1, 2, 3, 4, 3, 3, 1)  # blocks of each (Sandler et al. 2018, table 2)

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        net = VisionMobileNetV2(num_classes=0, with_pool=False)
        self.features = net.features[: self.last_step + 1]
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return list(self.features)

    def translate(self, arrays: Arrays) -> Arrays:
        """Take the names of timm; those of torchvision are Paddle's."""
        known = names.pair("", names.TIMM_STEM, "features.0.", names.CONV_NORM)
        for number, block in enumerate(names.staged("blocks.{}.{}.", self.stages), 1):
            expands = number > 1
            own = ("0.0", "0.1", "1.0", "1.1", "", "", "2", "3")
            if not expands:
                own = ("", "", "0.0", "0.1", "", "", "1", "2")
            known |= names.pair(block, names.timm_block(expands), f"features.{number}.conv.", own)
        return names.rename(arrays, known)


class MobileNetV3Large(Backbone):
    """Tap the outputs of inverted residual blocks.

    With `before_norm` tap the last convolution of these blocks instead, before its batch norm and
    the residual sum, as the reference code of CFLOW-AD does.
    """

    name = "mobilenet_v3_large"
    taps: ClassVar[Taps] = {2: (1, 16), 4: (3, 24), 8: (6, 40), 16: (12, 112), 32: (15, 160)}
    numbered_keys = r"blocks\."
    first_numbered_step = 1  # step 0 is the first convolution
    head_keys = ("lastconv.", "classifier.", "conv_head.")
    epsilon = 1e-3  # of the batch norms of paddle.vision and torchvision
    stages = (1, 2, 3, 4, 2, 3)  # blocks of each (Howard et al. 2019, table 1)
    squeezed = (3, 4, 5, *range(10, 15))  # blocks with squeeze-and-excitation, from 0

    def __init__(self, strides: Sequence[int], before_norm: bool = False) -> None:
        super().__init__(strides)
        net = VisionMobileNetV3Large(num_classes=0, with_pool=False)
        self.conv = net.conv
        self.blocks = net.blocks[: self.last_step]
        self.before_norm = before_norm
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return [self.conv, *self.blocks]

    def forward(self, image: Tensor) -> list[Tensor]:
        if not self.before_norm:
            return super().forward(image)
        self.hold_statistics()
        features = []
        x = self.conv(image)
        for step, block in enumerate(self.blocks, 1):
            projection, x = _run_block(block, x)
            if step in self.tapped_steps:
                features.append(projection)
        return features

    def translate(self, arrays: Arrays) -> Arrays:
        """Take the names of timm, with its epsilon, and of torchvision."""
        known = names.pair("", names.TIMM_STEM, "conv.", names.CONV_NORM)
        known |= names.pair("features.0.", names.CONV_NORM, "conv.", names.CONV_NORM)
        known |= names.pair("features.16.", names.CONV_NORM, "lastconv.", names.CONV_NORM)
        known |= names.pair("blocks.6.0.", ("conv", "bn1"), "lastconv.", names.CONV_NORM)
        for number, block in enumerate(names.staged("blocks.{}.{}.", self.stages)):
            expands, own = number > 0, f"blocks.{number}."
            known |= names.pair(block, names.timm_block(expands), own, V3_BLOCK)
            layers = names.torchvision_block(expands, number in self.squeezed)
            known |= names.pair(f"features.{number + 1}.", layers, own, V3_BLOCK)
        renamed = names.rename(arrays, known)
        if "conv_stem.weight" in arrays:
            return names.with_epsilon(renamed, names.TIMM_EPSILON, self.epsilon)
        return renamed


# Layers of a block of paddle.vision, in the order of `names.BLOCK`.
V3_BLOCK = (
    "expand_conv.0", "expand_conv.1", "bottleneck_conv.0", "bottleneck_conv.1",
    "mid_se.fc1", "mid_se.fc2", "linear_conv.0", "linear_conv.1",
)  # fmt: skip


def _run_block(block: nn.Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last convolution of an inverted residual block, and the block's output."""
    y = block.expand_conv(x) if block.expand else x
    y = block.bottleneck_conv(y)
    y = block.mid_se(y) if block.use_se else y
    convolution, norm = block.linear_conv
    projection = convolution(y)
    y = norm(projection)
    return projection, x + y if block.use_res_connect else y
