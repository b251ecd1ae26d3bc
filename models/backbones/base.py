"""A frozen network that turns an image into a pyramid of feature maps (B C H W)."""

import re
from collections.abc import Sequence
from typing import ClassVar

from paddle import Tensor, nn

from utils.errors import UserError

from .names import Arrays

Taps = dict[int, tuple[int, int]]  # stride -> (index of the step, channels)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Layer):
    """Run a chain of frozen steps and return the outputs of some of them.

    A subclass lists its taps, registers the steps up to `self.last_step` under the names that its
    weight files use, and then calls `freeze`. It gives `steps`, or a `forward` of its own.

    Attributes:
        name: under which `build_backbone` and the weights know the network.
        strides, channels: of the returned maps, finest first.
        mean, std: the normalisation that the weights expect, for images in [0, 1].
        weight_hash: sha256 over the loaded weights, whatever file they came in; empty before.
    """

    name: str
    taps: ClassVar[Taps]
    default_strides: ClassVar[tuple[int, ...]] = (4, 8, 16)
    numbered_keys: ClassVar[str]  # pattern before the number in the keys of a weight file
    first_numbered_step: ClassVar[int]  # index of the step whose number in a key is 0
    head_keys: ClassVar[tuple[str, ...]] = ()  # prefixes of the keys of layers never built
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __init__(self, strides: Sequence[int], taps: Taps | None = None) -> None:
        """Choose the taps, out of the class's if `taps` is not given.

        Raise `UserError` unless `strides` are distinct strides of this network.
        """
        super().__init__()
        taps = self.taps if taps is None else taps
        if not strides or len(set(strides)) < len(strides) or not set(strides) <= set(taps):
            raise UserError(
                f"backbone {self.name}: strides {list(strides)} must be one or more different "
                f"ones of {', '.join(map(str, taps))}"
            )
        self.strides = sorted(strides)
        self.channels = [taps[stride][1] for stride in self.strides]
        self.tapped_steps = [taps[stride][0] for stride in self.strides]
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

    def check_input_size(self, height: int, width: int) -> None:
        """Raise `UserError` if the network cannot take images of this size; most take any."""

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

    def parts(self) -> dict[str, "Backbone"]:
        """Return the networks whose weights are loaded, by the prefix of their keys in a file."""
        return {"": self}

    def translate(self, arrays: Arrays) -> Arrays:
        """Bring the arrays of a weight file to the names and layouts of this network."""
        return arrays

    def is_unused_key(self, key: str) -> bool:
        """Tell whether `key` of a weight file belongs to a layer behind the last tap."""
        match = re.match(rf"{self.numbered_keys}(\d+)\.", key)
        if match is None:
            return key.startswith(self.head_keys)
        return int(match[1]) + self.first_numbered_step > self.last_step
