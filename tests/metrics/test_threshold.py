"""Thresholds: values, guarantees by simulation, reading and writing, verdicts."""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from metrics import threshold as th
from metrics.roc import f1_max
from metrics.threshold import Policy, Threshold, is_defective, parse_policy
from utils.errors import UserError


@pytest.mark.parametrize(
    ("count", "q", "k"),
    [(12, 99, 12), (99, 99, 99), (100, 99, 100), (199, 99, 198), (9, 50, 5), (999, 99.9, 999),
     (1, 99, 1), (4999, 99.9, 4995), (20, 100, 20), (10, 1e-6, 1)],
)  # fmt: skip
def test_percentile_is_the_kth_smallest_score(count, q, k):
    scores = np.random.default_rng(count).permutation(count).astype(np.float32)
    chosen = th.percentile(scores, q)
    assert chosen.value == k - 1
    assert chosen.guaranteed_rate == (count + 1 - k) / (count + 1)
    assert chosen.normals == count
    assert chosen.target_rate == pytest.approx(1 - q / 100)


@pytest.mark.parametrize(("count", "q"), [(12, 99), (19, 90), (99, 99), (150, 95)])
def test_guarantee_holds_on_new_normals(count, q):
    rng = np.random.default_rng(count)
    draws, new = 3000, 20
    alarms = 0
    for _ in range(draws):
        # skewed, and rounded so that ties occur
        scores = np.round(rng.lognormal(sigma=1.5, size=count + new), 1)
        alarms += is_defective(scores[count:], th.percentile(scores[:count], q)).sum()
    rate = alarms / (draws * new)
    guaranteed = th.percentile(np.arange(count), q).guaranteed_rate or 0.0
    assert rate <= guaranteed + 0.005
    assert rate >= guaranteed - 0.02  # the bound is not idle: nearly reached, but for the ties


def test_guarantee_is_exact_without_ties():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((20_000, 13))
    alarms = [is_defective(row[12], th.percentile(row[:12], 80)) for row in draws]
    assert np.mean(alarms) == pytest.approx(2 / 13, abs=0.01)  # k = ceil(13 · 0.8) = 11


def test_pixel_percentile_is_ordinary():
    maps = np.random.default_rng(0).standard_normal((30, 128, 128)).astype(np.float32)
    chosen = th.pixel_percentile(maps)
    ordered = np.sort(maps.astype(np.float64), axis=None)
    position = 0.999 * (ordered.size - 1)
    below = math.floor(position)
    expected = ordered[below] + (position - below) * (ordered[below + 1] - ordered[below])
    assert chosen.value == pytest.approx(expected, rel=1e-9)
    assert (chosen.policy, chosen.normals) == ("percentile:99.9", 30)
    assert (chosen.target_rate, chosen.guaranteed_rate) == (0.001, None)
    assert th.pixel_percentile([maps[0], maps[1, :50]], 100).value == max(
        maps[0].max(), maps[1, :50].max()
    )


@pytest.mark.parametrize("levels", [2, 10, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_f1_reaches_the_maximum_under_strict_comparison(seed, levels):
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < 0.5
    scores = (np.round((rng.standard_normal(60) + labels) * levels) / levels).astype(np.float32)
    chosen = th.f1(scores, labels)
    assert f1_score(labels, is_defective(scores, chosen)) == pytest.approx(
        f1_max(scores, labels)[0], abs=1e-9
    )
    assert (chosen.policy, chosen.normals) == ("f1", np.count_nonzero(~labels))


def test_f1_lies_between_the_classes():
    assert th.f1([1, 2, 6, 9], [0, 0, 1, 1]).value == 4
    above = math.nextafter(1.0, 2.0)
    assert th.f1([1.0, above], [0, 1]).value == 1.0  # no number between the two
    lowest = th.f1([1.0, 1.0, 0.5], [1, 0, 1])  # best to call everything defective
    assert is_defective(0.5, lowest)
    assert is_defective(np.float32(0.5), lowest)


def test_f1_fallbacks():
    assert th.f1([3, 1, 2], [0, 0, 0]).value == 3
    assert th.f1([3, 1, 2], [1, 1, 1]).value == 1


def test_fixed():
    assert th.fixed(0.8) == Threshold(0.8, "fixed:0.8", None, None, 0)
    assert th.fixed(1.192936).value == 1.192936
    assert parse_policy(th.fixed(1 / 3).policy).value == 1 / 3


def test_a_tie_is_normal():
    assert not is_defective(0.5, 0.5)
    assert is_defective(0.5000001, th.fixed(0.5))
    scores = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    np.testing.assert_array_equal(is_defective(scores, float(scores[1])), [False, False, True])
    # decided in float64: as float32, the threshold 0.1 would equal the score
    assert is_defective(np.float32(0.1), 0.1)
    assert is_defective(scores, 0.1)[0]
    assert type(is_defective(np.float32(0.1), 0.1)) is bool
    value = float(np.float32(0.1))
    below = float(np.nextafter(value, 0))  # in float64: float32 has no number between
    for array in (np.full((2, 2), 0.1, np.float32), np.full((2, 2), value)):
        assert not is_defective(array, value).any()
        assert is_defective(array, below).all()
    assert is_defective(np.array([3e38], np.float32), 1e300).tolist() == [False]
    assert is_defective(np.array([-3e38], np.float32), -1e300).tolist() == [True]


def test_a_broken_score_has_no_verdict():
    for broken in (math.nan, math.inf, np.array([0.1, np.nan])):
        with pytest.raises(UserError, match="NaN or infinite"):
            is_defective(broken, 0.5)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("percentile", Policy("percentile", 99)),
        ("percentile:95.5", Policy("percentile", 95.5)),
        ("fixed:0.8", Policy("fixed", 0.8)),
        ("fixed:-3e2", Policy("fixed", -300)),
        ("f1", Policy("f1", None)),
    ],
)
def test_parse_policy(text, policy):
    assert parse_policy(text) == policy


def test_default_percentile_can_differ():
    assert parse_policy("percentile", 99.9) == Policy("percentile", 99.9)


@pytest.mark.parametrize(
    "text",
    ["", "best", "percentile:", "percentile:0", "percentile:101", "percentile:nan", "percentile:x",
     "fixed", "fixed:", "fixed:inf", "f1:0.5", "f1:", "Percentile:99", 0.8],
)  # fmt: skip
def test_unknown_policies_are_errors(text):
    with pytest.raises(UserError, match=r"threshold policy .* must be"):
        parse_policy(text)


@pytest.mark.parametrize(
    "chosen",
    [
        th.percentile(np.arange(12) / 7),
        th.pixel_percentile(np.arange(8.0).reshape(2, 2, 2)),
        th.fixed(0.8),
        th.f1([0.1, 0.7], [0, 1]),
        th.fair(np.arange(8.0).reshape(2, 2, 2)),
        th.zero_miss([0.1, 0.7], [0, 1]),
    ],
)
def test_round_trip(chosen):
    stored = json.loads(json.dumps(chosen.to_dict()))
    assert Threshold.from_dict(stored) == chosen
    assert Threshold.from_dict({"value": 1, "policy": "fixed:1.0"}) == th.fixed(1)
    assert type(Threshold.from_dict({"value": 1, "policy": "fixed:1.0"}).value) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "0.5"}, "threshold value '0.5'"),
        ({"value": None}, "threshold value None"),
        ({"value": math.nan}, "threshold value nan"),
        ({"value": True}, "threshold value True"),
        ({"policy": "guess"}, "threshold policy 'guess'"),
        ({"policy": None}, "threshold policy None"),
        ({"target_rate": 1.5}, "target_rate 1.5"),
        ({"guaranteed_rate": -0.1}, "guaranteed_rate -0.1"),
        ({"normals": -1}, "normals -1"),
        ({"normals": 1.5}, "normals 1.5"),
        ({"measured_rate": 2}, "measured_rate 2"),
        ({"treshold": 0.5}, "unknown key 'treshold'"),
    ],
)
def test_from_dict_names_what_is_wrong(change, message):
    good = th.percentile([0.1, 0.2]).to_dict()
    with pytest.raises(UserError, match=message) as caught:
        Threshold.from_dict(good | change)
    assert "\n" not in str(caught.value)


def test_from_dict_needs_value_and_policy():
    with pytest.raises(UserError, match="key 'value' is missing"):
        Threshold.from_dict({"policy": "f1"})
    with pytest.raises(UserError, match="key 'policy' is missing"):
        Threshold.from_dict({"value": 0.5})
    with pytest.raises(UserError, match="must be a mapping"):
        Threshold.from_dict(0.5)  # type: ignore[arg-type]


def test_nothing_to_choose_from():
    for call in (
        lambda: th.percentile([]),
        lambda: th.pixel_percentile([]),
        lambda: th.f1([], []),
        lambda: th.percentile([1.0, np.nan]),
        lambda: th.pixel_percentile([np.full((2, 2), np.inf)]),
        lambda: th.percentile([1.0], 0),
        lambda: th.fixed(math.nan),
    ):
        with pytest.raises(UserError):
            call()


def test_describe():
    few = replace(th.percentile(np.arange(12)), value=0.61424)
    assert few.describe() == (
        "threshold 0.6142 (percentile 99 of 12 normals; false-alarm rate at most 7.7 %; "
        "99 normals would be needed for 1 %)"
    )
    enough = replace(th.percentile(np.arange(120)), value=2)
    expected = "threshold 2 (percentile 99 of 120 normals; false-alarm rate at most 0.83 %)"
    assert enough.describe() == expected
    assert "at most 7.2 %" in th.percentile(np.arange(13)).describe()  # 1/14: rounded up
    assert "at most 100 %" not in th.percentile([0.5]).describe()
    pixels = th.pixel_percentile(np.zeros((3, 2, 2))).describe()
    assert pixels == "threshold 0 (percentile 99.9 of the pixels of 3 normals)"
    assert "fixed" in th.fixed(0.8).describe()
    assert "oracle" in th.f1([0.1, 0.7], [0, 1]).describe()


# --- thresholds of other papers


def test_fair_leaves_one_of_256_squared_pixels_above():
    maps = np.random.default_rng(0).permutation(4 * 256 * 256).reshape(4, 256, 256).astype(float)
    found = th.fair(maps)
    assert int((maps >= found.value).sum()) == 4
    assert (found.policy, found.normals, found.target_rate) == ("fair", 4, 256.0**-2)
    odd = np.arange(98304.0).reshape(1, 256, 384)  # 1.5 pixels: half way between two scores
    assert th.fair(odd).value == pytest.approx(98303 - 0.5)
    assert th.fair(np.arange(9.0).reshape(1, 3, 3)).value == 8  # too few pixels: their maximum
    with pytest.raises(UserError, match="no anomaly maps"):
        th.fair([])
    with pytest.raises(UserError, match="normal image 1: 1 of 4 values"):
        th.fair([np.zeros((2, 2)), np.array([[0, 1], [2, np.nan]])])


def test_fair_is_read_from_the_curve_of_false_positives():
    rng = np.random.default_rng(1)
    maps = [rng.standard_normal((300, 211)).astype(np.float32) for _ in range(5)]
    scores = np.sort(np.concatenate(maps, axis=None).astype(np.float64))[::-1]
    rates = np.arange(1, scores.size + 1) / scores.size  # scores >= the k-th highest
    assert th.fair(maps).value == pytest.approx(np.interp(1 / 65536, rates, scores), rel=1e-12)


def test_fair_copies_the_pixels_once():
    maps = np.random.default_rng(0).random((16, 256, 256), dtype=np.float32)
    before = maps.copy()
    tracemalloc.start()
    th.fair(maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * maps.nbytes
    np.testing.assert_array_equal(maps, before)


def test_nfa_reports_its_alarms():
    found = th.nfa([-2.0, 0.5, 0.0, -1.0])
    assert (found.value, found.policy, found.measured_rate, found.normals) == (0, "nfa", 0.25, 4)
    assert "1 of 4 held-out normals" in found.describe()
    assert Threshold.from_dict(found.to_dict()) == found
    with pytest.raises(UserError, match="hold out at least one"):
        th.nfa([])


def test_a_threshold_stored_before_there_was_a_measured_rate():
    old = {k: v for k, v in th.fixed(0.5).to_dict().items() if k != "measured_rate"}
    assert Threshold.from_dict(old) == th.fixed(0.5)


def test_youden_and_zero_miss():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    scores = np.round(rng.normal(size=200) + labels, 1)
    gains = {
        t: (scores > t)[labels == 1].mean() - (scores > t)[labels == 0].mean()
        for t in np.unique(scores) - 0.05
    }
    found = scores > th.youden(scores, labels).value
    gain = found[labels == 1].mean() - found[labels == 0].mean()
    assert gain == pytest.approx(max(gains.values()))
    cut = th.zero_miss(scores, labels).value
    assert (scores[labels == 1] > cut).all()
    assert not (scores[labels == 1] > cut + 0.11).all()
    above = math.nextafter(1.0, 2.0)
    for choose in (th.youden, th.zero_miss):
        assert choose([1, 2, 6, 9], [0, 0, 1, 1]).value == 4  # half way, or 6 would be missed
        assert choose([1.0, above], [0, 1]).value == 1.0  # no number between the two
        assert is_defective(0.5, choose([0.5, 0.5], [0, 1]))  # all tied: all are defects
        assert "oracle" in choose([0.1, 0.7], [0, 1]).describe()
        with pytest.raises(UserError, match="one kind only"):
            choose([1.0, 2.0], [1, 1])


@pytest.mark.parametrize("name", ["nfa", "fair", "youden", "zero_miss"])
def test_names_of_policies(name):
    assert parse_policy(name) == (name, None)
    with pytest.raises(UserError):
        parse_policy(f"{name}:3")
