"""DeiT-B/16 distilled and CaiT, run up to the tapped block and brought back to a map."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn.initializer import Constant

from utils.errors import UserError

from .base import Backbone, Taps
from .names import Arrays, rename

# B images, N tokens, C channels, h heads
PATCH = 16  # pixels per side
EPSILON = 1e-6  # of the layer norms
ZERO = Constant(0.0)


class Attention(nn.Layer):
    """Mix the tokens: softmax(q·kᵀ/√d)·v in every head (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.size = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).reshape([0, 0, 3, self.heads, self.size])
        qkv = qkv.transpose([2, 0, 3, 1, 4])  # (3, B, h, N, C / h)
        query, key, value = qkv[0] * self.size**-0.5, qkv[1], qkv[2]
        weights = self.weigh(paddle.matmul(query, key, transpose_y=True))  # (B, h, N, N)
        mixed = paddle.matmul(weights, value).transpose([0, 2, 1, 3])  # (B, N, h, C / h)
        return self.proj(mixed.reshape([0, 0, self.heads * self.size]))

    def weigh(self, logits: Tensor) -> Tensor:
        """Turn q·kᵀ/√d into the weights of the values, both (B, h, N, N)."""
        return F.softmax(logits, axis=-1)


class TalkingHeads(Attention):
    """Mix also the heads, before and after the softmax (Shazeer et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.proj_l = nn.Linear(heads, heads)
        self.proj_w = nn.Linear(heads, heads)

    def weigh(self, logits: Tensor) -> Tensor:
        return _mix_heads(F.softmax(_mix_heads(logits, self.proj_l), axis=-1), self.proj_w)


def _mix_heads(x: Tensor, linear: nn.Linear) -> Tensor:
    heads, tokens = x.shape[1], x.shape[2]
    # One product per image. A 1×1 convolution is faster, but oneDNN gets the next matmul wrong.
    flat = x.reshape([0, heads, tokens * tokens])
    mixed = paddle.matmul(linear.weight, flat, transpose_x=True) + linear.bias.unsqueeze(1)
    return mixed.reshape([0, heads, tokens, tokens])


class Mlp(nn.Layer):
    """Work on every token by itself, with four times its channels in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Layer):
    """Add attention, then the perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, epsilon=EPSILON)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class LayerScaleBlock(nn.Layer):
    """Do the same with talking heads, and with a learned scale per channel on what is added."""

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon=EPSILON)
        self.attn = TalkingHeads(width, heads)
        self.gamma_1 = self.create_parameter([width], default_initializer=Constant(scale))
        self.norm2 = nn.LayerNorm(width, epsilon=EPSILON)
        self.mlp = Mlp(width)
        self.gamma_2 = self.create_parameter([width], default_initializer=Constant(scale))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens))
        return tokens + self.gamma_2 * self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Layer):
    """Turn every patch into a token, row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2D(3, width, PATCH, PATCH)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose([0, 2, 1])  # (B, N, C)


class Transformer(Backbone):
    """Tap one block: its tokens behind the network's final norm, as a map of the patches."""

    image_size: ClassVar[int]  # pixels per side; the position embedding fits no other
    width: ClassVar[int]
    heads: ClassVar[int]
    first_tokens: ClassVar[tuple[str, ...]] = ()  # learned ones in front of the patches
    default_strides = (PATCH,)
    numbered_keys = r"blocks\."
    first_numbered_step = 1  # step 0 is the embedding

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(strides)
        self.patch_embed = PatchEmbedding(self.width)
        for name in self.first_tokens:
            self.add_parameter(name, self._zeros(1))
        self.pos_embed = self._zeros(len(self.first_tokens) + (self.image_size // PATCH) ** 2)
        self.blocks = nn.LayerList([self.new_block() for _ in range(self.last_step)])
        self.norm = nn.LayerNorm(self.width, epsilon=EPSILON)
        self.freeze()

    def _zeros(self, tokens: int) -> Tensor:
        return self.create_parameter([1, tokens, self.width], default_initializer=ZERO)

    def new_block(self) -> nn.Layer:
        """Build one block (B, N, C) -> (B, N, C)."""
        raise NotImplementedError

    def check_input_size(self, height: int, width: int) -> None:
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"backbone {self.name}: model.input_size is [{height}, {width}], but its position "
                f"embedding fits {self.image_size}×{self.image_size} only; use {self.image_size}"
            )

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens = self.patch_embed(image)
        if self.first_tokens:
            first = paddle.concat([getattr(self, name) for name in self.first_tokens], axis=1)
            tokens = paddle.concat([first.expand([tokens.shape[0], -1, -1]), tokens], axis=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.norm(tokens)[:, len(self.first_tokens) :]
        side = self.image_size // PATCH
        return [patches.transpose([0, 2, 1]).reshape([0, self.width, side, side])]

    def translate(self, arrays: Arrays) -> Arrays:
        """Take names of timm, PaddleClas and PASSL, and PyTorch's (outputs, inputs) matrices."""
        arrays = rename(arrays, {"patch_embed.patch_embed": "patch_embed.proj"})
        qkv = arrays.get("blocks.0.attn.qkv.weight", np.empty((1, 3)))
        if len(qkv) > qkv.shape[-1]:  # Paddle's is (C, 3·C)
            arrays = {key: a.T if a.ndim == 2 else a for key, a in arrays.items()}
        return arrays


class DeitBaseDistilled384(Transformer):
    """Tap block 7 of 12; class and distillation token are dropped."""

    name = "deit_base_distilled_384"
    taps: ClassVar[Taps] = {PATCH: (8, 768)}
    image_size, width, heads = 384, 768, 12
    first_tokens = ("cls_token", "dist_token")
    head_keys = ("head.", "head_dist.")

    def new_block(self) -> nn.Layer:
        return Block(self.width, self.heads)


class Cait(Transformer):
    """Stop before the class-attention blocks."""

    scale: ClassVar[float]  # of LayerScale, before training
    head_keys = ("cls_token", "blocks_token_only.", "head.")

    def new_block(self) -> nn.Layer:
        return LayerScaleBlock(self.width, self.heads, self.scale)


class CaitM48(Cait):
    """Tap block 40 of 48."""

    name = "cait_m48_448"
    taps: ClassVar[Taps] = {PATCH: (41, 768)}
    image_size, width, heads, scale = 448, 768, 16, 1e-6


class CaitS24(Cait):
    """Tap block 20 of 24."""

    name = "cait_s24_224"
    taps: ClassVar[Taps] = {PATCH: (21, 384)}
    image_size, width, heads, scale = 224, 384, 8, 1e-5
