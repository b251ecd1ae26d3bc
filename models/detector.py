"""The detector: normalise, frozen backbone, flow, scorer; the one inference path of the suite."""

import paddle
from paddle import Tensor, nn

from .flows.base import FeaturePyramid, Flow, dimensions, negative_log_likelihood


class Detector(nn.Layer):
    """Score images: trained, evaluated, exported and served by the same `forward`.

    Images are (B, 3, H, W), RGB in [0, 1], of the size the detector was built for.
    """

    def __init__(
        self, backbone: nn.Layer, flow: Flow, scorer: nn.Layer, input_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.flow = flow
        self.scorer = scorer
        self.input_size = input_size
        for name in ("mean", "std"):
            value = paddle.to_tensor(getattr(backbone, name), dtype="float32")
            self.register_buffer(name, value.reshape([1, 3, 1, 1]), persistable=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anomaly map (B, 1, H, W) and the score (B,); higher is worse."""
        return self.score(self.features(image))

    def features(self, image: Tensor) -> FeaturePyramid:
        """Return the frozen backbone's maps (B, C_i, H_i, W_i), finest first."""
        return self.backbone((image - self.mean) / self.std)

    def score(self, features: FeaturePyramid) -> tuple[Tensor, Tensor]:
        """Return map and score from backbone features."""
        latents, log_dets = self.flow(features)
        return self.scorer(latents, log_dets)

    def objective(self, features: FeaturePyramid) -> tuple[Tensor, Tensor]:
        """Return the training loss and the likelihood in nats per dimension, both scalars."""
        latents, log_dets = self.flow(features)
        return self.flow.loss(latents, log_dets), _nats_per_dimension(latents, log_dets).mean()

    def nll(self, image: Tensor) -> Tensor:
        """Return ½·z² − log|det J| in nats per latent dimension, without ½·ln 2π, shape (B,)."""
        return self.features_nll(self.features(image))

    def features_nll(self, features: FeaturePyramid) -> Tensor:
        """Return what `nll` does, from backbone features."""
        return _nats_per_dimension(*self.flow(features))

    def head_state(self) -> dict[str, Tensor]:
        """Return all that training changes: flow, norms and scorer, without the backbone."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}


def _nats_per_dimension(latents: FeaturePyramid, log_dets: list[Tensor]) -> Tensor:
    totals = negative_log_likelihood(latents, log_dets)
    return sum(totals[1:], totals[0]) / float(sum(dimensions(latents)))
