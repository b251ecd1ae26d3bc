"""A frozen network that turns an image into a pyramid of feature maps (B C H W)."""

import re
from collections.abc import Sequence
from typing import ClassVar

from paddle import Tensor, nn

from utils.errors import UserError

Taps = dict[int, tuple[int, int]]  # stride -> (index of the step, channels)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Layer):
    """Run a chain of frozen steps and return the outputs of some of them.

    A subclass lists its taps, registers the steps up to `self.last_step` under the names that its
    weight files use, and then calls `freeze`.

    Attributes:
        strides, channels: of the returned maps, finest first.
        mean, std: the normalisation that the weights expect, for images in [0, 1].
        weight_hash: sha256 over the loaded weights, whatever file they came in; empty before.
    """

    name: ClassVar[str]
    taps: ClassVar[Taps]
    numbered_keys: ClassVar[str]  # pattern before the number in the keys of a weight file
    first_numbered_step: ClassVar[int]  # index of the step whose number in a key is 0
    head_keys: ClassVar[tuple[str, ...]] = ()  # prefixes of the keys of layers never built
    mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_STD

    def __init__(self, strides: Sequence[int]) -> None:
        """Choose the taps; `UserError` unless `strides` are distinct strides of this network."""
        super().__init__()
        if not strides or len(set(strides)) < len(strides) or not set(strides) <= set(self.taps):
            raise UserError(
                f"backbone {self.name}: strides {list(strides)} must be one or more different "
                f"ones of {', '.join(map(str, self.taps))}"
            )
        self.strides = sorted(strides)
        self.channels = [self.taps[stride][1] for stride in self.strides]
        self.tapped_steps = [self.taps[stride][0] for stride in self.strides]
        self.last_step = self.tapped_steps[-1]
        self.weight_hash = ""
        self._norms: list[nn.Layer] = []

    def steps(self) -> list[nn.Layer]:
        """Return the layers in the order in which they run; the last one is the last tap."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map a normalised image (B, 3, H, W) to maps (B, C_i, ceil(H/stride), ceil(W/stride))."""
        self.hold_statistics()
        features = []
        x = image
        for index, step in enumerate(self.steps()):
            x = step(x)
            if index in self.tapped_steps:
                features.append(x)
        return features

    def freeze(self) -> None:
        """Take all parameters out of training, and the batch norms into evaluation mode."""
        for parameter in self.parameters():
            parameter.stop_gradient = True
        self._norms = [layer for layer in self.sublayers() if isinstance(layer, nn.BatchNorm2D)]
        self.hold_statistics()

    def hold_statistics(self) -> None:
        """Keep the batch norms in evaluation mode, also inside an outer `train()`.

        Paddle's `train()` writes its flag into all sublayers and calls none of their `train()`.
        """
        for layer in self._norms:
            layer.training = False

    def train(self, mode: bool = True) -> "Backbone":
        """Do nothing: a frozen network has no training mode."""
        return self

    def is_unused_key(self, key: str) -> bool:
        """Tell whether `key` of a weight file belongs to a layer behind the last tap."""
        match = re.match(rf"{self.numbered_keys}(\d+)\.", key)
        if match is None:
            return key.startswith(self.head_keys)
        return int(match[1]) + self.first_numbered_step > self.last_step
