"""Channel mixings that a flow draws once and keeps: permutations and rotations."""

import numpy as np
import paddle

PERMUTES = ("hard", "soft")


def draw_permutation(kind: str, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw indices (C,) if `hard`, a rotation matrix (C, C) if `soft`."""
    return rotation(channels, rng) if kind == "soft" else rng.permutation(channels)


def rotation(channels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a rotation matrix (C, C), float64, uniformly (Haar measure on SO(C)).

    Q of a Gaussian matrix is uniform once R's diagonal is positive (Mezzadri 2007); a negative
    determinant is mended by turning one column round. Takes about 1.5 s for 2048 channels.
    """
    # Paddle's, because NumPy's threads spin on a busy machine: up to twenty times slower
    q, r = paddle.linalg.qr(paddle.to_tensor(rng.standard_normal((channels, channels))))
    q = q * paddle.sign(paddle.diagonal(r))
    determinant = paddle.linalg.slogdet(q)[0].item()  # ±1
    matrix = q.numpy()
    matrix[:, 0] *= determinant
    return matrix
