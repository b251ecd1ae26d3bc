"""What every flow offers: forward, inverse, loss, folding for export."""

from paddle import Tensor, nn

from .layers import CouplingStep, GlobalAffine

FeaturePyramid = list[Tensor]  # (B, C_i, H_i, W_i), finest first


class Flow(nn.Layer):
    """Map a feature pyramid to latents that are standard normal on defect-free images.

    Attributes:
        latent_channels: of every level's latents, finest first.
    """

    latent_channels: list[int]

    def forward(self, features: FeaturePyramid) -> tuple[FeaturePyramid, list[Tensor]]:
        """Return latents and log-determinants per position, (B, 1, H_i, W_i)."""
        raise NotImplementedError

    def inverse(self, latents: FeaturePyramid) -> FeaturePyramid:
        """Return the normalised features that forward maps to `latents`."""
        raise NotImplementedError

    def loss(self, latents: FeaturePyramid, log_dets: list[Tensor], share: float = 1.0) -> Tensor:
        """Return the training objective, averaged over the batch: a scalar.

        `share` is how much of a larger batch these images are; the losses of all parts of it add
        up to its own.
        """
        raise NotImplementedError

    def fold(self) -> None:
        """Turn what depends on parameters alone into weights and constants, for export."""
        for layer in self.sublayers():
            if isinstance(layer, CouplingStep | GlobalAffine):
                layer.fold()


def negative_log_likelihood(latents: FeaturePyramid, log_dets: list[Tensor]) -> list[Tensor]:
    """Return ½·Σz² − log|det J| of every level: nats per image without ½·ln 2π, each (B,).

    Summed axis by axis: Paddle's sum over several axes loses digits.
    """
    totals = []
    for i in range(len(latents)):  # a static graph knows no strict zip
        energy = 0.5 * (latents[i] * latents[i]).sum(1, keepdim=True) - log_dets[i]  # (B, 1, H, W)
        totals.append(energy.sum(3).sum(2).sum(1))
    return totals


def dimensions(latents: FeaturePyramid) -> list[int]:
    """Return the number of latent values of one image at every level."""
    return [z.shape[1] * z.shape[2] * z.shape[3] for z in latents]
