"""The detector: normalise, frozen backbone, flow, scorer; the one inference path of the suite."""

from collections.abc import Iterable

import paddle
from paddle import Tensor, nn

from .backbones.base import Backbone
from .backbones.folding import fold_batch_norms
from .fast_backbone import Extract, fastest
from .flows.base import FeaturePyramid, Flow, dimensions, negative_log_likelihood
from .scoring.base import Evidence, Scorer


class Detector(nn.Layer):
    """Score images: trained, evaluated, exported and served by the same `forward`.

    Images are (B, 3, H, W), RGB in [0, 1], of the size the detector was built for.
    """

    def __init__(
        self,
        backbone: Backbone,
        flow: Flow,
        scorer: Scorer,
        input_size: tuple[int, int],
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.flow = flow
        self.scorer = scorer
        self.evidence = evidence
        self.input_size = input_size
        for name in ("mean", "std"):
            value = paddle.to_tensor(getattr(backbone, name), dtype="float32")
            self.register_buffer(name, value.reshape([1, 3, 1, 1]), persistable=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the anomaly map (B, 1, H, W), the score and the NLL (B,); higher is worse.

        Then follows, if it is wanted, the evidence of every level, (B, H_i, W_i). The NLL is that
        of `nll`: it tells whether an image is like the normal ones as a whole.
        """
        return self.score(self.features(image))

    def features(self, image: Tensor) -> FeaturePyramid:
        """Return the frozen backbone's maps (B, C_i, H_i, W_i), finest first."""
        return self.backbone((image - self.mean) / self.std)

    def extractor(self, count: int) -> Extract:
        """Return the fastest way to the features of so many images: to rounding, `features`."""
        return fastest(self, count)

    def score(self, features: FeaturePyramid) -> tuple[Tensor, ...]:
        """Return what `forward` does, from backbone features."""
        latents, log_dets = self.flow(features)
        anomaly_map, score = self.scorer(latents, log_dets)
        nll = _nats_per_dimension(latents, log_dets)
        if self.evidence is None:
            return anomaly_map, score, nll
        return anomaly_map, score, nll, *self.evidence(latents)

    @paddle.no_grad()
    def fit_scorer(self, pyramids: Iterable[FeaturePyramid]) -> None:
        """Set the scorer's constants, if it has any, from the features of training normals."""
        if self.scorer.learns:
            self.scorer.fit(self.flow(features) for features in pyramids)

    def objective(self, features: FeaturePyramid, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the training loss and the likelihood in nats per dimension, both scalars.

        They add up over the parts of a batch, of which these images are a `share`.
        """
        latents, log_dets = self.flow(features)
        nats = _nats_per_dimension(latents, log_dets).mean()
        return self.flow.loss(latents, log_dets, share), nats * share

    def nll(self, image: Tensor) -> Tensor:
        """Return ½·z² − log|det J| in nats per latent dimension, without ½·ln 2π, shape (B,)."""
        return self.features_nll(self.features(image))

    def features_nll(self, features: FeaturePyramid) -> Tensor:
        """Return what `nll` does, from backbone features."""
        return _nats_per_dimension(*self.flow(features))

    def fold(self) -> None:
        """Fold into weights and constants what depends on parameters alone, for export.

        The numbers stay the same. The detector can then run, but be neither trained nor saved.
        """
        fold_batch_norms(self.backbone, paddle.zeros([1, 3, *self.input_size]))
        self.flow.fold()

    def head_state(self) -> dict[str, Tensor]:
        """Return all that training changes: flow, norms and scorer, without the backbone."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}


def _nats_per_dimension(latents: FeaturePyramid, log_dets: list[Tensor]) -> Tensor:
    totals = negative_log_likelihood(latents, log_dets)
    return sum(totals[1:], totals[0]) / float(sum(dimensions(latents)))
