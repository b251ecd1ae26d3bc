"""The alarm for images that no longer look like the normal ones."""

import math

import numpy as np
import pytest

from metrics.drift import FEWEST, Drift, NormalNll
from utils.errors import UserError

NORMAL = NormalNll(1.0, 0.1, 40)


def watched(values, window=50, normal=NORMAL) -> Drift:
    drift = Drift(normal, window)
    for value in values:
        drift.add(float(value))
    return drift


def test_mean_and_deviation_of_normals():
    values = np.random.default_rng(0).normal(1.2, 0.3, 30)
    fitted = NormalNll.fit(values)
    assert fitted is not None
    assert (fitted.mean, fitted.count) == (pytest.approx(values.mean()), 30)
    assert fitted.std == pytest.approx(np.std(values, ddof=1))
    assert NormalNll.from_dict(fitted.to_dict()) == fitted


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [1.0, math.nan], [1.0, math.inf], []])
def test_nothing_is_known_from_values_that_say_nothing(values):
    assert NormalNll.fit(values) is None


@pytest.mark.parametrize("stored", [(1.0, 0.0, 9), (math.nan, 1.0, 9), (1.0, 1.0, 1)])
def test_stored_values_are_checked(stored):
    with pytest.raises(UserError, match="calibrate again"):
        NormalNll(*stored)


def test_images_like_the_normal_ones_give_no_alarm():
    """As often as promised, at most: 20,000 windows, of which 2 may be expected to alarm."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(20_000):
        normal = NormalNll.fit(rng.normal(0, 1, 12))
        assert normal is not None
        alarms += watched(rng.normal(0, 1, 20), normal=normal).alarm
    assert alarms <= 12


@pytest.mark.parametrize("shift", [0.15, -0.15])
def test_a_shift_of_all_images_gives_an_alarm(shift):
    values = np.random.default_rng(0).normal(1.0 + shift, 0.1, 50)
    drift = watched(values)
    assert drift.alarm
    assert np.sign(drift.z) == np.sign(shift)
    assert drift.warning().startswith("warning: most of these images differ")


def test_a_burst_of_defects_is_no_drift():
    values = np.random.default_rng(0).normal(1.0, 0.1, 50)
    values[20:32] += 3.0
    drift = watched(values)
    assert not drift.alarm
    assert drift.warning() == ""
    assert drift.mean == pytest.approx(values.mean())


def test_the_window_slides():
    drift = watched(np.full(30, 2.0), window=10)
    assert drift.alarm
    for value in np.linspace(0.9, 1.1, 10):
        drift.add(float(value))
    assert not drift.alarm
    assert drift.z == pytest.approx(0, abs=1e-9)
    assert drift.images == 40


def test_nothing_is_said_of_few_images():
    drift = watched(np.full(FEWEST - 1, 9.0))
    assert math.isnan(drift.z)
    assert not drift.alarm
    assert drift.describe() == ""
    drift.add(9.0)
    assert drift.describe().startswith("drift: z = +")
    assert "over the last 10 images" in drift.describe()


def test_what_is_not_finite_counts_as_unlikely():
    drift = watched([math.nan] * 8 + [1.0] * 7)
    assert drift.alarm
    assert drift.z == math.inf


def test_a_window_that_is_too_small():
    with pytest.raises(UserError, match=r"--drift_window 3: must be at least 10"):
        Drift(NORMAL, 3)
