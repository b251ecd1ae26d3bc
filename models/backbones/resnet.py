"""ResNet-18 and Wide-ResNet-50-2 of paddle.vision, tapped behind each group of blocks."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from paddle import nn
from paddle.vision.models.resnet import BasicBlock, BottleneckBlock, ResNet

from utils.errors import UserError

from .base import Backbone, Taps


class _TappedResNet(Backbone):
    """Tap the first ReLU and layer1 to layer4.

    With `padding` reflect the 7×7 and 3×3 convolutions mirror the map at its border, as those of
    CFLOW-AD's reference code do; the pooling does not.
    """

    block: ClassVar[type[nn.Layer]]
    depth: ClassVar[int]
    width: ClassVar[int]
    numbered_keys = "layer"
    first_numbered_step = 3  # layer1 is step 4, behind convolution, norm, ReLU and pooling
    head_keys = ("fc.",)

    def __init__(
        self, strides: Sequence[int], padding: Literal["zeros", "reflect"] = "zeros"
    ) -> None:
        if padding not in ("zeros", "reflect"):
            raise UserError(f"padding {padding!r} of {self.name} is not one of zeros, reflect")
        super().__init__(strides)
        net = ResNet(self.block, self.depth, self.width, num_classes=0, with_pool=False)
        if padding == "reflect":
            _reflect(net)
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self._order = names[: self.last_step + 1]
        for name in self._order:
            self.add_sublayer(name, getattr(net, name))
        self.freeze()

    def steps(self) -> list[nn.Layer]:
        return [getattr(self, name) for name in self._order]


class ResNet18(_TappedResNet):
    name = "resnet18"
    taps: ClassVar[Taps] = {2: (2, 64), 4: (4, 64), 8: (5, 128), 16: (6, 256), 32: (7, 512)}
    block, depth, width = BasicBlock, 18, 64


class WideResNet50(_TappedResNet):
    name = "wide_resnet50_2"
    taps: ClassVar[Taps] = {2: (2, 64), 4: (4, 256), 8: (5, 512), 16: (6, 1024), 32: (7, 2048)}
    block, depth, width = BottleneckBlock, 50, 128


def _reflect(net: ResNet) -> None:
    """Put convolutions with reflect padding in the place of all those that pad."""
    net.conv1 = _reflecting(net.conv1, 2)
    for block in net.sublayers():
        if isinstance(block, BasicBlock):
            block.conv1 = _reflecting(block.conv1, block.stride)
            block.conv2 = _reflecting(block.conv2, 1)
        elif isinstance(block, BottleneckBlock):
            block.conv2 = _reflecting(block.conv2, block.stride)


def _reflecting(conv: nn.Conv2D, stride: int) -> nn.Conv2D:
    outputs, inputs, kernel, _ = conv.weight.shape
    return nn.Conv2D(
        inputs, outputs, kernel, stride, kernel // 2, padding_mode="reflect", bias_attr=False
    )
