"""Scores of image sets, thresholds from normal images, metrics of a test set."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from engine.batches import Source, in_order
from engine.evaluator import Calibration, calibrate, evaluate_set, infer, run, score_all
from metrics.nfa import calibrate as fit_nulls
from metrics.nfa import standard_nulls
from metrics.threshold import Threshold, fair, fixed
from utils.config import Config, from_dict
from utils.errors import UserError


class Brightness(nn.Layer):
    """A detector whose map is the first channel and whose score is its maximum.

    Its evidence, if wanted, is the second channel of its 3×3 corner.
    """

    def __init__(self, with_evidence: bool = False) -> None:
        super().__init__()
        self.with_evidence = with_evidence
        self.flow = SimpleNamespace(latent_channels=[4])

    def forward(self, image: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        return self.score([image])

    def score(self, features: list[paddle.Tensor]) -> tuple[paddle.Tensor, ...]:
        anomaly_map = features[0][:, :1]
        evidence = [features[0][:, 1, :3, :3]] if self.with_evidence else []
        return anomaly_map, anomaly_map.max([1, 2, 3]), anomaly_map.mean([1, 2, 3]), *evidence


def images(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((count, 3, 8, 6)).astype(np.float32)


def source(data: np.ndarray, asked: list[int] | None = None) -> Source:
    def read(indices: np.ndarray) -> list[np.ndarray]:
        if asked is not None:
            asked.extend(indices.tolist())
        return [data[indices]]

    return Source(len(data), read, list)


def config(image: str, pixel: str, **sections: Any) -> Config:
    chosen = {"image_threshold": image, "pixel_threshold": pixel, "batch_size": 4}
    return from_dict({"eval": chosen, "model": {"input_size": 256}, **sections}, "test")


def calibrated(data: np.ndarray, image: str, pixel: str, **sections: Any) -> Calibration:
    return calibrate(Brightness(bool(sections)), source(data), config(image, pixel, **sections))


def test_maps_and_scores_come_in_order():
    data = images(7)
    detector = Brightness()
    detector.train()
    parts = list(infer(detector, source(data), in_order(7, 3)))
    assert not detector.training
    assert np.concatenate([indices for indices, _ in parts]).tolist() == list(range(7))
    for size in (1, 3, 7, 100):
        whole = score_all(detector, source(data), size)
        np.testing.assert_array_equal(whole.maps, data[:, 0])
        np.testing.assert_array_equal(whole.scores, data[:, 0].max((1, 2)))
        assert whole.evidence == []


def test_evidence_comes_along():
    data = images(5)
    whole = score_all(Brightness(True), source(data), 2)
    np.testing.assert_array_equal(whole.evidence[0], data[:, 1, :3, :3])


def test_the_likelihood_of_normals_is_kept():
    data = images(9)
    made = calibrated(data, "percentile:60", "percentile:99").nll
    assert made is not None
    assert made.mean == pytest.approx(data[:, 0].mean(), rel=1e-6)
    assert made.count == 9
    calibration = Calibration.from_dict(calibrated(data, "fixed:1", "fixed:1").to_dict())
    assert calibration.nll == made
    older = {k: v for k, v in calibration.to_dict().items() if k != "nll"}
    assert Calibration.from_dict(older).nll is None


def test_nothing_is_recorded_for_gradients():
    layer = nn.Conv2D(3, 1, 1)

    class Trainable(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer

        def forward(self, image):
            made.append(self.conv(image))
            return made[-1], made[-1].max([1, 2, 3]), made[-1].mean([1, 2, 3])

    made: list[paddle.Tensor] = []
    run(Trainable(), images(2))
    assert made[0].stop_gradient


def test_thresholds_come_from_the_given_images_alone():
    data = images(9)
    asked: list[int] = []
    made = calibrate(Brightness(), source(data, asked), config("percentile:60", "percentile:99"))
    assert sorted(asked) == list(range(9))
    scores = np.sort(data[:, 0].max((1, 2)))
    assert made.image.value == scores[5]  # conformal: rank ceil(10 · 0.6) = 6
    assert made.image.normals == 9
    assert made.pixel.value == pytest.approx(np.percentile(data[:, 0].astype(float), 99), rel=1e-6)
    assert made.pixel.policy == "percentile:99"


def test_the_colour_scale_has_the_pixel_threshold_in_its_middle():
    made = calibrated(images(5), "percentile:99", "percentile:99.9")
    low, high = made.color_scale
    assert low < made.pixel.value < high
    assert (low + high) / 2 == pytest.approx(made.pixel.value)
    assert low == pytest.approx(np.median(images(5)[:, 0]))


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_the_colour_scale_always_rises(value):
    low, high = calibrated(images(5), "fixed:0.5", f"fixed:{value}").color_scale
    assert low < high
    flat = np.full((3, 3, 8, 6), 0.25, np.float32)
    low, high = calibrated(flat, "percentile:99", "percentile:99.9").color_scale
    assert low < high


def test_fixed_thresholds_and_what_cannot_be_stored():
    made = calibrated(images(3), "fixed:0.8", "fixed:0.7")
    assert (made.image, made.pixel) == (fixed(0.8), fixed(0.7))


def test_the_fair_threshold_comes_from_training_images():
    train, holdout = images(6, seed=1), images(3)
    settings = config("percentile:99", "fair")
    made = calibrate(Brightness(), source(holdout), settings, source(train))
    assert made.pixel == fair(list(train[:, 0]))
    with pytest.raises(UserError, match="'fair' needs the training images"):
        calibrate(Brightness(), source(holdout), settings)


def test_nfa_decides():
    """One held-out normal of four has an energy that no χ² law with four degrees explains."""
    data = images(4)
    data[0, 1, 1, 1] = 2000.0
    section = {"method": "tree", "calibrate": False, "tests": "by_size"}
    made = calibrated(data, "nfa", "nfa", nfa=section)
    assert (made.image.value, made.image.policy, made.image.measured_rate) == (0.0, "nfa", 0.25)
    assert made.pixel == made.image
    assert made.acontrario is not None
    assert made.acontrario.nulls == tuple(standard_nulls([4]))
    low, high = made.color_scale
    assert low < np.percentile(data[:, 0], 99.9) < high  # the maps' own scale
    outputs = infer(Brightness(True), source(data), in_order(4, 3))
    found = evaluate_set(outputs, [1, 0, 0, 0], lambda i: None, NAMES, calibration=made)
    assert found.verdicts == [True, False, False, False]
    assert found.metrics.values["false_alarm_rate"] == 0
    again = Calibration.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made


def test_the_null_hypothesis_is_fitted_to_held_out_normals():
    data = images(6)
    data[:, 1] *= 3
    made = calibrated(data, "percentile:99", "nfa", nfa={"method": "tree"})
    assert made.acontrario is not None
    assert made.acontrario.nulls == tuple(fit_nulls([data[:, 1, :3, :3]], [4]))


def test_a_calibration_survives_json():
    made = calibrated(images(5), "percentile:99", "percentile:99.9")
    assert Calibration.from_dict(json.loads(json.dumps(made.to_dict()))) == made


# --- test sets

LABELS = [0, 0, 1, 1]
NAMES = [f"photo {i}" for i in range(4)]
CUTS = Calibration(Threshold(0.5, "fixed:0.5"), Threshold(0.5, "fixed:0.5"), (0.0, 1.0))


def scene() -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Two dark images, and two with a bright corner that their masks mark."""
    data = 0.1 * images(4, seed=1)
    data[2:, 0, :2, :3] = 0.9
    mask = np.zeros((8, 6), bool)
    mask[:2, :3] = True
    nothing = np.zeros((8, 6), bool)
    return data, [nothing, nothing, mask, mask]


def evaluated(
    data: np.ndarray, masks: Sequence[np.ndarray | None], labels=LABELS, **options
):  # fmt: skip
    settings = {"calibration": CUTS, **options}
    outputs = infer(Brightness(), source(data), in_order(len(data), 3))
    found = evaluate_set(outputs, labels, lambda i: masks[i], NAMES[: len(labels)], **settings)
    return found[:3]


def test_a_perfect_detector():
    metrics, scores, verdicts = evaluated(*scene())
    np.testing.assert_array_equal(scores, scene()[0][:, 0].max((1, 2)))
    assert verdicts == [False, False, True, True]
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1", "miou", "iou"):
        assert metrics.values[name] == pytest.approx(1.0), name
    assert metrics.values["aupro_0.3"] == pytest.approx(1.0)
    assert metrics.values["false_alarm_rate"] == metrics.values["miss_rate"] == 0
    assert not metrics.reasons


def test_each_map_is_compared_with_its_own_mask():
    data, masks = scene()
    wrong = [*masks[:2], masks[2][::-1], masks[3]]  # type: ignore[index]
    metrics, _, _ = evaluated(data, wrong)
    assert metrics.values["pixel_auroc"] < 0.9
    assert metrics.values["miou"] == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_binned_metrics_are_those_of_whole_maps_and_keep_none():
    data, masks = scene()
    wrong = [*masks[:2], masks[2][::-1], masks[3]]  # type: ignore[index]
    whole, scores, verdicts = evaluated(data, wrong)
    outputs = infer(Brightness(), source(data), in_order(4, 3))
    found = evaluate_set(
        outputs, LABELS, wrong.__getitem__, NAMES, calibration=CUTS, binned=True
    )  # fmt: skip
    assert found.pixels == ([], [], [])
    np.testing.assert_array_equal(found.scores, scores)
    assert found.verdicts == verdicts
    assert set(found.metrics.values) == set(whole.values)
    for name, value in found.metrics.values.items():
        if name != "miou_oracle":
            assert value == pytest.approx(whole.values[name], abs=2e-3), name
    assert set(found.metrics.reasons) == {"miou_oracle"}
    (warning,) = found.metrics.warnings
    assert warning.startswith("binned: the exact values differ by at most pixel_auroc ")


def test_binned_metrics_without_masks_are_undefined_or_leave_images_out():
    data, masks = scene()
    options = {"calibration": CUTS, "binned": True}
    metrics, _, _ = evaluated(data, [*masks[:3], None], **options)
    assert "photo 3" in metrics.reasons["pixel_auroc"]
    metrics, _, _ = evaluated(data, [*masks[:3], None], allow_missing_masks=True, **options)
    assert metrics.values["pixel_auroc"] == pytest.approx(1.0, abs=2e-3)


def test_binned_metrics_warn_of_masks_as_those_of_whole_maps_do():
    data, masks = scene()
    doubtful = [masks[2], None, np.zeros((8, 6), bool), masks[3]]
    for options in ({}, {"allow_missing_masks": True}):
        for given in (doubtful, [*doubtful[:3], None], [None] * 4):
            whole, _, _ = evaluated(data, given, **options)
            found, _, _ = evaluated(data, given, binned=True, **options)
            own = [each for each in found.warnings if not each.startswith("binned:")]
            assert own == whole.warnings
            for name in ("pixel_auroc", "miou", "pro"):
                assert found.reasons.get(name) == whole.reasons.get(name), name
    normal = (data[:2], [None] * 2, [0] * 2)
    whole, _, _ = evaluated(*normal)
    found, _, _ = evaluated(*normal, binned=True)
    assert found.reasons["pixel_auroc"] == whole.reasons["pixel_auroc"]
    assert "no defective images" in found.reasons["pixel_auroc"]


def test_binned_metrics_refuse_thresholds_that_need_whole_maps():
    by_nfa = Calibration(Threshold(0.0, "nfa"), Threshold(0.0, "nfa"), (0.0, 1.0))
    with pytest.raises(UserError, match="--binned: thresholds of policy nfa"):
        evaluated(*scene(), calibration=by_nfa, binned=True)


def test_missing_masks():
    data, masks = scene()
    metrics, _, _ = evaluated(data, [*masks[:3], None])
    assert metrics.values["image_auroc"] == 1
    assert np.isnan(metrics.values["pixel_auroc"])
    assert "photo 3" in metrics.reasons["pixel_auroc"]
    metrics, _, _ = evaluated(data, [*masks[:3], None], allow_missing_masks=True)
    assert metrics.values["pixel_auroc"] == 1
    assert any("photo 3" in warning for warning in metrics.warnings)


def test_only_normal_images():
    data, masks = scene()
    metrics, _, _ = evaluated(data[:2], masks[:2], labels=[0, 0])
    for name in ("image_auroc", "pixel_auroc", "aupro_0.3", "miss_rate"):
        assert np.isnan(metrics.values[name])
        assert metrics.reasons[name] == "test set has no defective images"
    assert metrics.values["miou"] == 1
    assert metrics.values["false_alarm_rate"] == 0


def test_without_thresholds():
    metrics, _, _ = evaluated(*scene(), calibration=None)
    assert metrics.values["image_auroc"] == 1
    assert metrics.reasons["miss_rate"] == "no image threshold"
    assert metrics.reasons["miou"] == "no pixel threshold"


@pytest.mark.parametrize("factor", [2, 5])
def test_maps_are_brought_to_the_size_of_the_masks(factor):
    data, masks = scene()
    larger = [np.kron(m, np.ones((factor, factor))) > 0 for m in masks if m is not None]
    metrics, _, _ = evaluated(data, larger)
    assert metrics.values["pixel_auroc"] == pytest.approx(1.0, abs=0.02)
    assert metrics.values["iou"] > 0.7


def test_nan_names_the_image():
    data, masks = scene()
    data[1, 0, 3, 3] = np.nan
    with pytest.raises(UserError, match="photo 1"):
        evaluated(data, masks)
