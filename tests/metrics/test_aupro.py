"""AUPRO against golden values, the specification's example and a slow threshold sweep."""

import numpy as np
import pytest
from scipy import ndimage

from metrics.aupro import aupro, label_regions, region_pixels
from utils.errors import UserError

LIMITS = (0.05, 0.3, 1.0)


def sweep(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Return AUPRO the slow way: the curve at every distinct score, cut at `limit`, trapezoids."""
    regions = []  # (image, boolean mask)
    for image, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(image, labels == number) for number in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        rates.append(found[masks == 0].mean())
        overlaps.append(np.mean([found[image][region].mean() for image, region in regions]))
    x, y = np.array(rates), np.array(overlaps)
    inside = x <= limit
    after = int(inside.sum())  # rates ascend, so this is the first point beyond the limit
    x_cut, y_cut = x[inside], y[inside]
    if after < x.size:
        share = (limit - x[after - 1]) / (x[after] - x[after - 1])
        y_limit = y[after - 1] + share * (y[after] - y[after - 1])
        x_cut, y_cut = np.append(x_cut, limit), np.append(y_cut, y_limit)
    return float(((x_cut[1:] - x_cut[:-1]) * (y_cut[1:] + y_cut[:-1]) / 2).sum()) / limit


def draw(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 maps (5, 24, 20) with ties and blob masks, some of which touch diagonally."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((5, 24, 20)), (0, 1.5, 1.5))
    masks = (smooth > 0.28).astype(np.uint8)
    masks[seed % 5] = 0
    noise = ndimage.gaussian_filter(rng.standard_normal(smooth.shape), (0, 1, 1))
    maps = smooth + noise
    return (np.round(maps * levels) / levels).astype(np.float32), masks


@pytest.mark.parametrize("levels", [1, 3, 20, 100_000])
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_threshold_sweep(seed, levels):
    maps, masks = draw(seed, levels)
    ours = aupro(maps, masks, LIMITS)
    assert list(ours) == list(LIMITS)
    for limit in LIMITS:
        assert ours[limit] == pytest.approx(sweep(maps, masks, limit), abs=1e-12)
        assert 0 <= ours[limit] <= 1


def test_limit_on_a_sample_point():
    maps = np.array([[[5, 4, 3, 2, 1, 0]]], dtype=np.float32)
    masks = np.array([[[0, 1, 0, 1, 0, 0]]])
    for limit in (0.25, 0.5, 0.75):
        assert aupro(maps, masks, [limit])[limit] == pytest.approx(sweep(maps, masks, limit))


@pytest.mark.parametrize("name", ["metrics_basic", "metrics_quantised_ties"])
def test_golden(golden, name):
    data = golden(name)
    ours = aupro(data["scores"], data["masks"])
    for limit in (0.3, 0.05):
        exact = float(data[f"val/mvtec_exact_aupro_{limit}"])
        assert ours[limit] == pytest.approx(exact, abs=1e-12)
        other = float(data[f"val/anomalib270_aupro_{limit}"])
        assert ours[limit] == pytest.approx(other, abs=1e-6)  # computed in float32 there
    regions = sum(label_regions(mask)[1].size for mask in data["masks"])
    assert regions == data["val/n_regions_8conn"]


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, (0.166667, 0.318182, 0.795455)), (2, (0.104938, 0.236728, 0.740741))],
)
def test_specification_example(example, images, expected):
    maps, masks = example
    ours = aupro(maps[:images], masks[:images], LIMITS)
    np.testing.assert_allclose(list(ours.values()), expected, atol=1e-6)


def test_regions_are_8_connected(example):
    labels, areas = label_regions(example[1][0])
    assert sorted(areas) == [2, 3]  # three regions of 1, 1 and 3 pixels with 4-connectivity
    assert labels[0, 0] == labels[1, 1] != labels[2, 3] == labels[3, 2]
    assert aupro(example[0][:1], example[1][:1])[0.3] != pytest.approx(0.292929, abs=1e-3)


def test_regions_count_equally_whatever_their_size():
    maps = np.zeros((2, 10, 10), dtype=np.float32)
    masks = np.zeros_like(maps)
    masks[0, :2, :2] = masks[1, :8, :8] = 255  # only the small one is found, all of it
    maps[0, :2, :2] = 1
    for limit, value in aupro(maps, masks).items():
        assert value == pytest.approx(0.5 + 0.5 * limit / 2)
    weights = region_pixels(maps, masks).weights
    np.testing.assert_allclose(np.unique(weights), [1 / 128, 1 / 8])


def test_depends_on_the_order_only():
    maps, masks = draw(seed=3, levels=20)
    for transform in (np.exp, np.arctan, lambda x: 1e5 * x - 1e3):
        assert aupro(transform(maps.astype(np.float64)), masks) == aupro(maps, masks)


def test_constant_perfect_and_inverted_maps():
    masks = draw(seed=0, levels=1)[1]
    for limit in LIMITS:
        assert aupro(0 * masks, masks, [limit])[limit] == pytest.approx(limit / 2)
        assert aupro(masks, masks, [limit])[limit] == pytest.approx(1)
        assert aupro(masks, masks, [limit])[limit] <= 1
        assert aupro(-1.0 * masks, masks, [limit])[limit] == pytest.approx(0)


def test_random_maps_score_half_the_limit():
    rng = np.random.default_rng(0)
    masks = np.zeros((20, 64, 64), dtype=bool)
    masks[:, 16:48, 16:48] = True
    maps = rng.random(masks.shape, dtype=np.float32)
    assert aupro(maps, masks)[0.3] == pytest.approx(0.15, abs=0.01)


def test_images_of_different_sizes_and_missing_masks():
    maps, masks = draw(seed=2, levels=20)
    together = aupro(maps[:2], masks[:2])
    split = [maps[0], maps[1, :10], maps[1, 10:]]
    masks[1] = 0
    assert aupro(split, [masks[0], None, masks[1, 10:]]) == aupro(maps[:2], masks[:2])
    assert together != aupro(maps[:2], masks[:2])


def test_undefined_is_nan():
    maps = np.random.default_rng(0).random((2, 5, 5))
    assert np.isnan(list(aupro(maps, [None, None]).values())).all()
    assert np.isnan(list(aupro(maps, np.ones_like(maps)).values())).all()
    assert np.isnan(list(aupro([], []).values())).all()


@pytest.mark.parametrize("limit", [0, -0.1, 1.1, float("nan")])
def test_limit_is_checked(example, limit):
    with pytest.raises(UserError, match="AUPRO limit"):
        aupro(example[0], example[1], [limit])


def test_maps_are_checked():
    good = np.zeros((4, 4), dtype=np.float32)
    broken = good.copy()
    broken[1, 2] = np.nan
    with pytest.raises(UserError, match="image 1: 1 of 16 values are NaN or infinite"):
        aupro([good, broken], [None, None])
    with pytest.raises(UserError, match=r"mask of image 0: shape \(8, 8\)"):
        aupro([good], [np.zeros((8, 8))])
    with pytest.raises(UserError, match=r"shape \(1, 4, 4\), must be \(H, W\)"):
        aupro([good[None]], [None])
    with pytest.raises(UserError, match="1 anomaly maps but 2 masks"):
        aupro([good], [None, None])
