"""Scores of image sets, thresholds from normal images, metrics of a test set."""

from collections.abc import Sequence

import numpy as np
import paddle
import pytest
from paddle import nn

from engine.batches import in_order
from engine.evaluator import Calibration, calibrate, evaluate_set, infer, run, score_all
from metrics.threshold import Threshold, fixed
from utils.errors import UserError


class Brightness(nn.Layer):
    """A detector whose map is the first channel and whose score is its maximum."""

    def forward(self, image: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        anomaly_map = image[:, :1]
        return anomaly_map, anomaly_map.max([1, 2, 3])


def images(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((count, 3, 8, 6)).astype(np.float32)


def reader(data: np.ndarray, asked: list[int] | None = None):
    def read(indices: np.ndarray) -> list[np.ndarray]:
        if asked is not None:
            asked.extend(indices.tolist())
        return [data[indices]]

    return read


def calibrated(data: np.ndarray, image: str, pixel: str, size: int = 4) -> Calibration:
    return calibrate(Brightness(), reader(data), len(data), size, image, pixel)


def test_maps_and_scores_come_in_order():
    data = images(7)
    detector = Brightness()
    detector.train()
    indices, maps, scores = zip(*infer(detector, reader(data), in_order(7, 3)), strict=True)
    assert not detector.training
    assert np.concatenate(indices).tolist() == list(range(7))
    np.testing.assert_array_equal(np.concatenate(maps), data[:, 0])
    np.testing.assert_array_equal(np.concatenate(scores), data[:, 0].max((1, 2)))
    for size in (1, 7, 100):
        whole = score_all(detector, reader(data), 7, size)
        np.testing.assert_array_equal(whole[0], data[:, 0])
        np.testing.assert_array_equal(whole[1], data[:, 0].max((1, 2)))


def test_nothing_is_recorded_for_gradients():
    layer = nn.Conv2D(3, 1, 1)

    class Trainable(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer

        def forward(self, image):
            made.append(self.conv(image))
            return made[-1], made[-1].max([1, 2, 3])

    made: list[paddle.Tensor] = []
    run(Trainable(), images(2))
    assert made[0].stop_gradient


def test_thresholds_come_from_the_given_images_alone():
    data = images(9)
    asked: list[int] = []
    made = calibrate(Brightness(), reader(data, asked), 9, 4, "percentile:60", "percentile:99")
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
    for image, pixel in (("f1", "fixed:1"), ("fixed:1", "f1")):
        with pytest.raises(UserError, match="a threshold comes from normal images or from you"):
            calibrated(images(3), image, pixel)


def test_a_calibration_survives_json():
    import json

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
    settings = {"batch_size": 3, "calibration": CUTS, **options}
    names = NAMES[: len(labels)]
    return evaluate_set(Brightness(), reader(data), labels, lambda i: masks[i], names, **settings)


def test_a_perfect_detector():
    metrics, scores = evaluated(*scene())
    np.testing.assert_array_equal(scores, scene()[0][:, 0].max((1, 2)))
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1", "miou", "iou"):
        assert metrics.values[name] == pytest.approx(1.0), name
    assert metrics.values["aupro_0.3"] == pytest.approx(1.0)
    assert metrics.values["false_alarm_rate"] == metrics.values["miss_rate"] == 0
    assert not metrics.reasons


def test_each_map_is_compared_with_its_own_mask():
    data, masks = scene()
    wrong = [*masks[:2], masks[2][::-1], masks[3]]  # type: ignore[index]
    metrics, _ = evaluated(data, wrong)
    assert metrics.values["pixel_auroc"] < 0.9
    assert metrics.values["miou"] == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_missing_masks():
    data, masks = scene()
    metrics, _ = evaluated(data, [*masks[:3], None])
    assert metrics.values["image_auroc"] == 1
    assert np.isnan(metrics.values["pixel_auroc"])
    assert "photo 3" in metrics.reasons["pixel_auroc"]
    metrics, _ = evaluated(data, [*masks[:3], None], allow_missing_masks=True)
    assert metrics.values["pixel_auroc"] == 1
    assert any("photo 3" in warning for warning in metrics.warnings)


def test_only_normal_images():
    data, masks = scene()
    metrics, _ = evaluated(data[:2], masks[:2], labels=[0, 0])
    for name in ("image_auroc", "pixel_auroc", "aupro_0.3", "miss_rate"):
        assert np.isnan(metrics.values[name])
        assert metrics.reasons[name] == "test set has no defective images"
    assert metrics.values["miou"] == 1
    assert metrics.values["false_alarm_rate"] == 0


def test_without_thresholds():
    metrics, _ = evaluated(*scene(), calibration=None)
    assert metrics.values["image_auroc"] == 1
    assert metrics.reasons["miss_rate"] == "no image threshold"
    assert metrics.reasons["miou"] == "no pixel threshold"


@pytest.mark.parametrize("factor", [2, 5])
def test_maps_are_brought_to_the_size_of_the_masks(factor):
    data, masks = scene()
    larger = [np.kron(m, np.ones((factor, factor))) > 0 for m in masks if m is not None]
    metrics, _ = evaluated(data, larger)
    assert metrics.values["pixel_auroc"] == pytest.approx(1.0, abs=0.02)
    assert metrics.values["iou"] > 0.7


def test_nan_names_the_image():
    data, masks = scene()
    data[1, 0, 3, 3] = np.nan
    with pytest.raises(UserError, match="photo 1"):
        evaluated(data, masks)
