"""What every scorer offers, and the evidence for the a-contrario test beside it."""

from collections.abc import Iterable

from paddle import Tensor, nn
from scipy.special import gammaincinv


class Scorer(nn.Layer):
    """Turn latents and log-determinants into a map (B, 1, H, W) and a score (B,).

    A scorer that `learns` has constants to fit on training normals before its scores mean anything.
    """

    learns = False

    def forward(self, latents: list[Tensor], log_dets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the map at input size and the score; higher is worse."""
        raise NotImplementedError

    def fit(self, batches: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Set the constants from the latents and log-determinants of training normals."""


class Evidence(nn.Layer):
    """Return per scale (B, h, w) what metrics/acontrario.py tests.

    `tree`: the squared latents summed over the channels. `block`: the number of channels whose
    squared latent is not below the χ²_1 quantile of `probability`.
    """

    def __init__(self, method: str, probability: float) -> None:
        super().__init__()
        self.level = 2.0 * float(gammaincinv(0.5, probability)) if method == "block" else None

    def forward(self, latents: list[Tensor]) -> list[Tensor]:
        squares = [z * z for z in latents]
        if self.level is None:
            return [square.sum(1) for square in squares]
        return [(square >= self.level).astype("float32").sum(1) for square in squares]
