"""Overlap at a threshold against direct set counts."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import jaccard_score

from metrics.iou import (
    best_miou,
    iou,
    iou_batch10,
    miou,
    pro_at_threshold,
    threshold_grid,
)
from utils.errors import UserError


@pytest.fixture
def test_set() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    masks = ndimage.gaussian_filter(rng.standard_normal((23, 16, 12)), (0, 2, 2)) > 0.2
    masks[3] = masks[7] = False
    return (masks + rng.standard_normal(masks.shape)).astype(np.float32), masks


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 2.0])
def test_equals_jaccard(test_set, threshold):
    maps, masks = test_set
    found = maps > threshold
    assert iou(maps, masks, threshold) == pytest.approx(
        jaccard_score(masks.ravel(), found.ravel()), abs=1e-12
    )
    single = [
        jaccard_score(mask.ravel(), hit.ravel(), zero_division=1)
        for mask, hit in zip(masks, found, strict=True)
    ]
    assert miou(maps, masks, threshold) == pytest.approx(np.mean(single), abs=1e-12)
    batches = [
        jaccard_score(masks[start : start + 10].ravel(), found[start : start + 10].ravel())
        for start in (0, 10, 20)
    ]
    assert iou_batch10(maps, masks, threshold) == pytest.approx(np.mean(batches), abs=1e-12)


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 2.0])
def test_pro_is_the_mean_recall_of_regions(test_set, threshold):
    maps, masks = test_set
    recalls = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        recalls += [(anomaly_map[labels == n] > threshold).mean() for n in range(1, count + 1)]
    assert pro_at_threshold(maps, masks, threshold) == pytest.approx(np.mean(recalls), abs=1e-12)


def test_normal_images_count_one_or_nothing():
    maps = np.zeros((4, 6, 6), dtype=np.float32)
    maps[0, 2, 2] = 1  # one false pixel
    assert miou(maps, [None] * 4, 0.5) == pytest.approx(0.75)
    assert miou(maps, np.zeros_like(maps), 0.5) == pytest.approx(0.75)


def test_a_tie_is_normal():
    maps, masks = np.full((1, 2, 2), 0.1, dtype=np.float32), np.ones((1, 2, 2))
    exactly = float(np.float32(0.1))
    assert miou(maps, masks, exactly) == pytest.approx(0, abs=1e-12)
    # in float32 the threshold 0.1 would become the score itself, and the verdict would flip
    assert miou(maps, masks, 0.1) == 1


def test_undefined_is_nan():
    maps = np.zeros((2, 3, 3))
    assert np.isnan(pro_at_threshold(maps, [None, None], 0.5))
    assert np.isnan([miou([], [], 0.5), iou([], [], 0.5), iou_batch10([], [], 0.5)]).all()


@pytest.mark.parametrize("function", [iou, miou, iou_batch10, pro_at_threshold])
def test_not_finite_is_an_error(function):
    with pytest.raises(UserError, match="anomaly map of image 0"):
        function([np.full((2, 2), np.nan)], [None], 0.5)


def test_the_best_threshold_of_a_grid():
    rng = np.random.default_rng(5)
    masks = [(rng.random((9, 7)) > 0.7).astype(np.uint8), None, np.zeros((9, 7), np.uint8)]
    maps = [np.round(rng.random((9, 7)), 1) for _ in masks]
    grid = threshold_grid(maps, 20)
    assert (np.diff(grid) > 0).all()
    each = [miou(maps, masks, float(t)) for t in grid]
    assert best_miou(maps, masks, grid) == pytest.approx(max(each))
    assert best_miou(maps, masks, grid[:1]) == pytest.approx(each[0])
    assert threshold_grid(maps)[-1] == max(m.max() for m in maps)  # the cut that finds nothing


def test_ties_on_the_grid_are_normal():
    maps = [np.full((2, 2), 0.1, dtype=np.float32)]
    exactly = float(np.float32(0.1))
    assert best_miou(maps, [np.ones((2, 2))], np.array([exactly])) == pytest.approx(0, abs=1e-12)
    assert best_miou(maps, [np.ones((2, 2))], np.array([0.1])) == 1
