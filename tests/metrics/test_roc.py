"""Ranking metrics against scikit-learn, the specification's example and golden values."""

import numpy as np
import pytest
from sklearn import metrics as sk

from metrics.roc import auroc, average_precision, f1_max, f1_of_counts, pr_curve, roc_curve
from utils.errors import UserError

CASES = [(seed, levels) for seed in range(4) for levels in (2, 5, 40, 10_000)]


def draw(seed: int, levels: int, size: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 scores with about `levels` distinct values, and labels they depend on."""
    rng = np.random.default_rng(seed)
    labels = rng.random(size) < 0.2 + 0.2 * seed
    noise = rng.standard_normal(size) + labels
    return (np.round(noise * levels / 8) / levels).astype(np.float32), labels


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_equals_scikit_learn_with_ties(seed, levels):
    scores, labels = draw(seed, levels)
    assert auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    expected = sk.average_precision_score(labels, scores)
    assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)

    precision, recall, thresholds = sk.precision_recall_curve(labels, scores)
    f1 = (2 * precision * recall / (precision + recall + 1e-10))[:-1]
    value, threshold = f1_max(scores, labels)
    assert value == pytest.approx(f1.max(), abs=1e-12)
    assert threshold == thresholds[f1.argmax()]
    assert value == pytest.approx(sk.f1_score(labels, scores >= threshold), abs=1e-9)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_curves_equal_scikit_learn(seed, levels):
    scores, labels = draw(seed, levels)
    for ours, theirs in zip(
        roc_curve(scores, labels),
        sk.roc_curve(labels, scores, drop_intermediate=False),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    precision, recall, thresholds = pr_curve(scores, labels)
    expected = sk.precision_recall_curve(labels, scores)
    np.testing.assert_allclose(precision, expected[0][::-1], atol=1e-12)
    np.testing.assert_allclose(recall, expected[1][::-1], atol=1e-12)
    np.testing.assert_array_equal(thresholds[1:], expected[2][::-1])
    assert thresholds[0] == np.inf


@pytest.mark.parametrize("name", ["metrics_basic", "metrics_quantised_ties"])
def test_golden(golden, name):
    data = golden(name)
    pixels, masks = data["scores"], data["masks"]
    assert auroc(pixels, masks) == pytest.approx(float(data["val/pixel_auroc_sklearn"]), abs=1e-12)
    expected = float(data["val/pixel_ap_sklearn"])
    assert average_precision(pixels, masks) == pytest.approx(expected, abs=1e-12)
    images = auroc(pixels.max(axis=(1, 2)), data["labels"])
    assert images == pytest.approx(float(data["val/image_auroc_max_sklearn"]), abs=1e-12)


def test_specification_example(example):
    maps, masks = example
    assert auroc(maps, masks) == pytest.approx(0.744444, abs=1e-6)
    assert average_precision(maps, masks) == pytest.approx(0.319643, abs=1e-6)
    value, threshold = f1_max(maps, masks)
    assert value == pytest.approx(0.476190, abs=1e-6)
    assert threshold == 8 / 15
    precision, recall, _ = pr_curve(maps, masks)
    assert np.trapezoid(precision, recall) == pytest.approx(0.350060, abs=1e-6)  # aupr_trapz


@pytest.mark.parametrize("transform", [np.exp, np.arctan, lambda x: 1e6 * x - 3e9])
def test_depends_on_the_order_only(transform):
    scores, labels = draw(seed=1, levels=40)
    changed = transform(scores.astype(np.float64))
    assert auroc(changed, labels) == auroc(scores, labels)
    assert average_precision(changed, labels) == average_precision(scores, labels)
    assert f1_max(changed, labels)[0] == f1_max(scores, labels)[0]
    assert f1_max(changed, labels)[1] == transform(np.float64(f1_max(scores, labels)[1]))


def test_extremes():
    labels = np.repeat([0, 1], 50)
    assert auroc(labels, labels) == average_precision(labels, labels) == 1
    assert auroc(-labels, labels) == 0
    assert auroc(np.zeros(100), labels) == 0.5
    assert average_precision(np.zeros(100), labels) == 0.5
    assert f1_max(np.zeros(100), labels)[0] == pytest.approx(2 / 3)


def test_large_scores_are_not_squashed():
    # likelihood scores lie far outside [0, 1]; a hidden sigmoid would make them equal
    assert auroc(np.array([900, 901, 902, 903], dtype=np.float32), [0, 0, 1, 1]) == 1


def test_any_shape_and_dtype():
    scores, labels = draw(seed=2, levels=40)
    expected = auroc(scores, labels)
    assert auroc(scores.reshape(3, 10, 20), labels.reshape(3, 10, 20)) == expected
    assert auroc(scores.astype(np.float64), labels.astype(np.uint8)) == expected
    assert auroc(scores.tolist(), labels.tolist()) == expected


def test_undefined_is_nan():
    scores = np.arange(4.0)
    assert np.isnan(auroc(scores, np.zeros(4)))
    assert np.isnan(auroc(scores, np.ones(4)))
    assert np.isnan(average_precision(scores, np.zeros(4)))
    assert np.isnan(f1_max(scores, np.zeros(4))).all()
    assert np.isnan(auroc([], []))
    assert average_precision(scores, np.ones(4)) == 1
    fpr, tpr, _ = roc_curve(scores, np.ones(4))
    assert np.isnan(fpr).all()
    assert tpr[-1] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [auroc, average_precision, f1_max, roc_curve, pr_curve])
def test_not_finite_is_an_error(function, bad):
    with pytest.raises(UserError, match=r"1 of 3 values are NaN or infinite"):
        function([0.1, bad, 0.3], [0, 1, 1])


def test_labels_are_checked():
    with pytest.raises(UserError, match="label -1"):
        auroc([0.1, 0.2], [0, -1])
    with pytest.raises(UserError, match="2 scores but 1 labels"):
        auroc([0.1, 0.2], [0])


def test_f1_of_counts():
    assert f1_of_counts(2, 1, 1) == pytest.approx(2 / 3, abs=1e-9)
    assert f1_of_counts(0, 0, 3) == 0
    np.testing.assert_allclose(f1_of_counts([3, 0], [0, 5], [0, 0]), [1, 0], atol=1e-9)


def test_equal_f1_takes_the_lowest_threshold():
    # score >= 3: precision 1, recall 1/2; score >= 1: precision 1/2, recall 1
    value, threshold = f1_max([3, 2, 2, 1], [1, 0, 0, 1])
    assert value == pytest.approx(2 / 3)
    assert threshold == 1
