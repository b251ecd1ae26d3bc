"""MSCaiT of U-Flow: CaiT-M48 on the image, and CaiT-S24 on the image at half the size."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import paddle
from paddle import Tensor

from utils.errors import UserError

from .base import Backbone, Taps
from .vit import Cait, CaitM48, CaitS24

CUBIC = -0.75  # parameter of the interpolation kernel, as in PyTorch and Paddle


class MultiScaleCait(Backbone):
    """Return the maps of two independent networks, at strides 16 and 32 of the image.

    The second one's image is resized bicubically with aligned corners, as a product with constant
    matrices, which runs on every inference engine.
    """

    name = "mcait"
    taps: ClassVar[Taps] = {16: (0, 768), 32: (1, 384)}
    default_strides = (16, 32)
    fine: ClassVar[type[Cait]] = CaitM48
    coarse: ClassVar[type[Cait]] = CaitS24

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        if self.strides != list(self.taps):
            raise UserError(f"backbone {self.name}: strides {list(strides)} must be 16 and 32")
        self.extractor1 = self.fine(self.fine.default_strides)
        self.extractor2 = self.coarse(self.coarse.default_strides)
        matrix = bicubic_matrix(self.fine.image_size, self.coarse.image_size).astype(np.float32)
        self.register_buffer("shrink", paddle.to_tensor(matrix), persistable=False)
        self.freeze()

    def parts(self) -> dict[str, Backbone]:
        return {"extractor1.": self.extractor1, "extractor2.": self.extractor2}

    def check_input_size(self, height: int, width: int) -> None:
        self.extractor1.check_input_size(height, width)

    def forward(self, image: Tensor) -> list[Tensor]:
        narrow = paddle.matmul(image, self.shrink, transpose_y=True)  # (B, 3, H, W / 2)
        small = paddle.matmul(self.shrink, narrow)  # (B, 3, H / 2, W / 2)
        return [*self.extractor1(image), *self.extractor2(small)]


def bicubic_matrix(inputs: int, outputs: int) -> np.ndarray:
    """Return the (outputs, inputs) matrix of one-dimensional bicubic resizing, corners aligned.

    There is no antialiasing; beyond the border lie copies of the border (Keys 1981).
    """
    position = np.arange(outputs) * ((inputs - 1) / max(outputs - 1, 1))
    before = np.floor(position).astype(np.int64)
    matrix = np.zeros((outputs, inputs))
    for offset in (-1, 0, 1, 2):
        source = before + offset
        distance = np.abs(position - source)
        inner = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        outer = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        weight = np.where(distance <= 1, inner, np.where(distance < 2, outer, 0.0))
        np.add.at(matrix, (np.arange(outputs), np.clip(source, 0, inputs - 1)), weight)
    return matrix
