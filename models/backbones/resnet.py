"""ResNet-18 and Wide-ResNet-50-2 of paddle.vision, tapped behind each group of blocks."""

from collections.abc import Sequence
from typing import ClassVar

from paddle import nn
from paddle.vision.models.resnet import BasicBlock, BottleneckBlock, ResNet

from .base import Backbone, Taps


class _TappedResNet(Backbone):
    block: ClassVar[type[nn.Layer]]
    depth: ClassVar[int]
    width: ClassVar[int]
    numbered_keys = "layer"
    first_numbered_step = 3  # layer1 is step 4, behind convolution, norm, ReLU and pooling
    head_keys = ("fc.",)

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        net = ResNet(self.block, self.depth, self.width, num_classes=0, with_pool=False)
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self._order = names[: self.last_step + 1]
        for name in self._order:
            self.add_sublayer(name, getattr(net, name))
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return [getattr(self, name) for name in self._order]


class ResNet18(_TappedResNet):
    """Tap the first ReLU and layer1 to layer4."""

    name = "resnet18"
    taps: ClassVar[Taps] = {2: (2, 64), 4: (4, 64), 8: (5, 128), 16: (6, 256), 32: (7, 512)}
    block, depth, width = BasicBlock, 18, 64


class WideResNet50(_TappedResNet):
    """Tap the first ReLU and layer1 to layer4."""

    name = "wide_resnet50_2"
    taps: ClassVar[Taps] = {2: (2, 64), 4: (4, 256), 8: (5, 512), 16: (6, 1024), 32: (7, 2048)}
    block, depth, width = BottleneckBlock, 50, 128
