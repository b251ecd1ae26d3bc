"""Maps and scores: up-sampling, blur, independence of companions."""

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from scipy.ndimage import gaussian_filter

from models.flows.base import negative_log_likelihood
from models.scoring.fastflow import SCORES, FastFlowScorer
from models.scoring.maps import upsampling_matrix

SIZES = [(8, 6), (4, 3)]
INPUT = (32, 24)


def log_dets(batch: int, seed: int = 1) -> list[paddle.Tensor]:
    rng = np.random.default_rng(seed)
    return [paddle.to_tensor(rng.standard_normal((batch, 1, *s)), "float32") for s in SIZES]


def latents(batch: int, seed: int = 0) -> list[paddle.Tensor]:
    rng = np.random.default_rng(seed)
    return [paddle.to_tensor(rng.standard_normal((batch, 5, *s)), "float32") for s in SIZES]


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling_equals_interpolation(align_corners):
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 1, 7, 5)), "float32")
    expected = F.interpolate(
        x, size=[28, 40], mode="bilinear", align_corners=align_corners
    ).numpy()[0, 0]
    rows = upsampling_matrix(7, 28, align_corners)
    columns = upsampling_matrix(5, 40, align_corners)
    np.testing.assert_allclose(rows @ x.numpy()[0, 0] @ columns.T, expected, atol=1e-5)


def test_map_is_the_smoothed_mean_and_score_the_sharp_maximum():
    z = latents(2)
    scorer = FastFlowScorer(SIZES, INPUT, score="probability", align_corners=False, blur_sigma=2.5)
    anomaly_map, score = scorer(z, log_dets(2))
    levels = []
    for level in z:
        small = 1 - np.exp(-0.5 * (level.numpy() ** 2).mean(1))
        levels.append(np.stack([cv2.resize(m, INPUT[::-1]) for m in small]))
    sharp = np.mean(levels, 0)
    np.testing.assert_allclose(score.numpy(), sharp.max((1, 2)), atol=1e-6)
    smooth = np.stack([gaussian_filter(m.astype(np.float64), 2.5) for m in sharp])
    np.testing.assert_allclose(anomaly_map.numpy()[:, 0], smooth, atol=1e-6)


def test_score_may_be_taken_from_the_smoothed_map():
    scorer = FastFlowScorer(
        SIZES, INPUT, score="nll", align_corners=False, blur_sigma=2.5, score_from="smooth"
    )
    anomaly_map, score = scorer(latents(2), log_dets(2))
    np.testing.assert_array_equal(score.numpy(), anomaly_map.numpy().max((1, 2, 3)))


def test_energy_does_not_saturate():
    z = [20 * level for level in latents(2)]
    maps = {}
    for score in ("probability", "energy"):
        scorer = FastFlowScorer(SIZES, INPUT, score=score, align_corners=False, blur_sigma=0.0)
        maps[score] = scorer(z, log_dets(2))[1].numpy()
    assert (maps["probability"] == 1).all()
    assert len(set(maps["energy"].tolist())) == 2


def test_nll_map_sums_to_the_likelihood():
    """At the resolution of a single level, the map is the likelihood of every position."""
    z, changes = latents(2)[:1], log_dets(2)[:1]
    scorer = FastFlowScorer(SIZES[:1], SIZES[0], score="nll", align_corners=False, blur_sigma=0.0)
    anomaly_map, _ = scorer(z, changes)
    (total,) = negative_log_likelihood(z, changes)
    np.testing.assert_allclose(anomaly_map.numpy().sum((1, 2, 3)) * 5, total.numpy(), rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_the_same_alone_and_in_any_batch(score):
    scorer = FastFlowScorer(SIZES, INPUT, score=score, align_corners=True, blur_sigma=1.0)
    z = latents(6)
    changes = log_dets(6)
    together = scorer(z, changes)[1].numpy()
    for i in range(6):
        one = slice(i, i + 1)
        alone = scorer([v[one] for v in z], [v[one] for v in changes])[1].numpy()
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6)
