"""Binned pixel metrics: within their stated bounds of the exact ones, on any scale of scores."""

import numpy as np
import pytest

from benchmarks.bench_metrics import draw
from metrics.binned import BITS, BinnedPixels, _bins
from metrics.suite import evaluate
from utils.errors import UserError

EXACT = ("pixel_f1", "iou", "miou", "pro")


def binned(maps, masks, threshold=None):
    pixels = BinnedPixels(threshold)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.add(anomaly_map, mask)
    return pixels.metrics()


@pytest.mark.parametrize(("gain", "shift"), [(1, 0), (1e-4, 0), (1e4, -3e4), (1e-3, 40)])
def test_values_are_within_their_bounds_of_the_exact_ones(gain, shift):
    maps, masks, labels = draw(20, 64)
    maps = (gain * maps + shift).astype(np.float32)
    cut = float(np.quantile(maps, 0.97))
    exact = evaluate(maps.max((1, 2)), labels, maps, masks, 0.0, cut).values
    found = binned(maps, masks, cut)
    assert set(found.bounds) == {
        "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3", "aupro_0.05",
    }  # fmt: skip
    for name, bound in found.bounds.items():
        assert abs(found.values[name] - exact[name]) <= bound + 1e-12, name
        if shift != 40:
            assert bound < 0.01, name
    for name in EXACT:
        assert found.values[name] == pytest.approx(exact[name], abs=1e-12), name


def test_coarse_scores_make_wide_bounds_that_hold():
    """With scores that differ by less than a bin, nothing is known, and the bounds say so."""
    maps, masks, labels = draw(8, 32)
    maps = (1000.1 + 1e-3 * maps).astype(np.float32)
    exact = evaluate(maps.max((1, 2)), labels, maps, masks).values
    found = binned(maps, masks)
    assert found.values["pixel_auroc"] == pytest.approx(0.5)
    assert found.bounds["pixel_auroc"] == pytest.approx(0.5)
    for name, bound in found.bounds.items():
        assert abs(found.values[name] - exact[name]) <= bound + 1e-12, name


def test_ties_across_images_are_exact():
    """Few different values: every bin holds one of them, so nothing is lost."""
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 16, 16), np.uint8)
    masks[:3, 4:8, 4:9] = 1
    maps = rng.integers(0, 5, masks.shape).astype(np.float32) + masks
    labels = [1, 1, 1, 0, 0, 0]
    exact = evaluate(maps.max((1, 2)), labels, maps, masks).values
    found = binned(maps, masks)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3"):
        assert found.values[name] == pytest.approx(exact[name], abs=1e-12), name


def test_bins_rise_with_scores_over_all_signs_and_sizes():
    largest = np.finfo(np.float32).max
    values = [-largest, -1e3, -1.001, -1, -1e-30, 0, 1e-30, 1, 1.001, 9e9, largest]
    bins = _bins(np.array(values, np.float32)).astype(np.int64)
    assert (np.diff(bins) > 0).all()
    assert bins.max() < 1 << BITS
    assert (_bins(np.float32(-0.0).reshape(1)) == _bins(np.zeros(1, np.float32))).all()


def test_sizes_may_differ_and_normal_images_need_no_mask():
    maps, masks, _ = draw(4, 32)
    pixels = BinnedPixels()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.add(anomaly_map, mask)
    pixels.add(np.zeros((8, 20), np.float32), None)
    more = [*maps, np.zeros((8, 20), np.float32)]
    exact = evaluate(np.zeros(5), [1, 1, 1, 0, 0], more, [*masks, None]).values
    found = pixels.metrics()
    assert (
        abs(float(found.values["pixel_auroc"]) - exact["pixel_auroc"])
        <= found.bounds["pixel_auroc"]
    )


def test_what_is_undefined_has_a_reason():
    none = binned([np.zeros((4, 4), np.float32)], [None], 0.5)
    assert none.values["pixel_auroc"] == "masks mark no defective pixels"
    assert none.values["miou"] == 1.0
    assert "all maps at once" in none.values["miou_oracle"]
    nothing = BinnedPixels(0.5).metrics().values
    assert nothing["miou"] == "no image has a ground-truth mask"
    assert nothing["pro"] == "masks mark no defective pixels"
    full = binned([np.zeros((4, 4), np.float32)], [np.ones((4, 4))])
    assert full.values["aupro_0.3"] == "masks leave no normal pixels"
    assert full.values["pixel_f1"] == "no pixel threshold"


def test_a_map_with_nan_is_named():
    with pytest.raises(UserError, match=r"anomaly map of b\.png"):
        BinnedPixels().add(np.full((2, 2), np.nan, np.float32), None, "b.png")
