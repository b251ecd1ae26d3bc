"""Curves: their areas are the metrics, and thinning keeps how they look."""

import numpy as np
import pytest

from metrics import curves
from metrics.aupro import aupro, region_pixels
from metrics.curves import COLUMNS, Curve
from metrics.pixels import sorted_background
from metrics.roc import auroc, average_precision, pr_curve, rank, rank_labelled, roc_curve
from metrics.suite import evaluate


def area(curve: Curve) -> float:
    return float(np.trapezoid(curve.y, curve.x))


def many(seed: int = 0, count: int = 20_000, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.1
    scores = rng.standard_normal(count) + labels
    return (scores.round(1) if ties else scores), labels


@pytest.mark.parametrize("scores", [[4, 3, 2, 1, 0], [3, 3, 1, 1, 1], [0, 1, 2, 3, 4], [1] * 5])
def test_few_points_are_exact(scores):
    labels = [1, 0, 1, 0, 0]
    found = curves.roc(rank_labelled(scores, labels))
    x, y, _ = roc_curve(scores, labels)
    assert set(zip(*found, strict=True)) <= set(zip(x, y, strict=True))
    assert area(found) == pytest.approx(auroc(scores, labels))
    assert (found.x[0], found.y[0], found.x[-1], found.y[-1]) == (0, 0, 1, 1)
    steps = curves.precision_recall(rank_labelled(scores, labels))
    assert area(steps) == pytest.approx(average_precision(scores, labels))


@pytest.mark.parametrize("ties", [False, True])
def test_areas_are_the_metrics(ties):
    scores, labels = many(ties=ties)
    ranking = rank_labelled(scores, labels)
    roc, pr = curves.roc(ranking), curves.precision_recall(ranking)
    assert max(len(roc.x), len(pr.x)) <= 4 * COLUMNS
    assert area(roc) == pytest.approx(auroc(scores, labels), abs=2e-3)
    assert area(pr) == pytest.approx(average_precision(scores, labels), abs=2e-3)


def test_thinning_leaves_every_point_within_a_column():
    scores, labels = many(3)
    thin = curves.roc(rank_labelled(scores, labels))
    x, y, _ = roc_curve(scores, labels)
    low = np.interp(x - 1 / COLUMNS, thin.x, thin.y, left=0)
    high = np.interp(x + 1 / COLUMNS, thin.x, thin.y, right=1)
    assert ((low - 1e-9 <= y) & (y <= high + 1e-9)).all()
    precision, recall, _ = pr_curve(scores, labels)
    steps = curves.precision_recall(rank_labelled(scores, labels))
    assert steps.y.max() == pytest.approx(precision[recall > 0].max())
    assert steps.y.min() == pytest.approx(precision[recall > 0][-1], abs=0.01)


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    masks = np.zeros((6, 40, 40), np.uint8)
    masks[:3, 5:15, 5:12] = masks[1:4, 25:28, 20:38] = 1
    return rng.standard_normal(masks.shape) + 1.5 * masks, masks


def test_overlap_has_the_area_of_aupro(scene):
    maps, masks = scene
    inside = region_pixels(maps, masks)
    ranking = rank(inside.scores, sorted_background(maps, masks))
    for limit in (0.3, 0.05):
        found = curves.overlap(ranking, inside.weights, limit)
        assert found.x[-1] == limit
        assert area(found) / limit == pytest.approx(aupro(maps, masks, [limit])[limit], abs=2e-3)
    assert (np.diff(found.y) >= 0).all()


def test_the_suite_has_the_curves_that_are_defined(scene):
    maps, masks = scene
    labels = masks.any((1, 2)).astype(int)
    whole = evaluate(maps.max((1, 2)), labels, maps, masks)
    assert set(whole.curves) == {"image_roc", "image_pr", "pixel_roc", "pixel_pr", "overlap"}
    assert area(whole.curves["image_roc"]) == pytest.approx(whole.values["image_auroc"])
    assert area(whole.curves["overlap"]) / 0.3 == pytest.approx(whole.values["aupro_0.3"], abs=2e-3)
    assert set(evaluate(maps.max((1, 2)), labels).curves) == {"image_roc", "image_pr"}
    good = evaluate(maps[4:].max((1, 2)), [0, 0], maps[4:], masks[4:])
    assert good.curves == {}
    bad = evaluate(maps[:4].max((1, 2)), [1] * 4, maps[:4], masks[:4])
    assert set(bad.curves) == {"pixel_roc", "pixel_pr", "overlap"}
    unmasked = evaluate(maps.max((1, 2)), labels, maps, [None] * 6)
    assert set(unmasked.curves) == {"image_roc", "image_pr"}
