"""MobileNetV2 and MobileNetV3-Large of paddle.vision, tapped at the last block of each stride."""

from collections.abc import Sequence
from typing import ClassVar

from paddle import Tensor, nn
from paddle.vision.models import MobileNetV2 as VisionMobileNetV2
from paddle.vision.models import MobileNetV3Large as VisionMobileNetV3Large

from .base import Backbone, Taps


class MobileNetV2(Backbone):
    """Tap the outputs of inverted residual blocks."""

    name = "mobilenet_v2"
    taps: ClassVar[Taps] = {2: (1, 16), 4: (3, 24), 8: (6, 32), 16: (13, 96), 32: (17, 320)}
    numbered_keys = r"features\."
    first_numbered_step = 0
    head_keys = ("classifier.",)

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        net = VisionMobileNetV2(num_classes=0, with_pool=False)
        self.features = net.features[: self.last_step + 1]
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return list(self.features)


class MobileNetV3Large(Backbone):
    """Tap the outputs of inverted residual blocks.

    With `before_norm` tap the last convolution of these blocks instead, before its batch norm and
    the residual sum, as the reference code of CFLOW-AD does.
    """

    name = "mobilenet_v3_large"
    taps: ClassVar[Taps] = {2: (1, 16), 4: (3, 24), 8: (6, 40), 16: (12, 112), 32: (15, 160)}
    numbered_keys = r"blocks\."
    first_numbered_step = 1  # step 0 is the first convolution
    head_keys = ("lastconv.", "classifier.")

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


def _run_block(block: nn.Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last convolution of an inverted residual block, and the block's output."""
    y = block.expand_conv(x) if block.expand else x
    y = block.bottleneck_conv(y)
    y = block.mid_se(y) if block.use_se else y
    convolution, norm = block.linear_conv
    projection = convolution(y)
    y = norm(projection)
    return projection, x + y if block.use_res_connect else y
