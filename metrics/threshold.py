"""Thresholds: what they are, how they are chosen, and what false-alarm rate they guarantee."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metrics.roc import check_finite, checked, f1_max, roc_curve
from utils.errors import UserError

_ORACLES = {
    "f1": "best F1", "youden": "largest difference of hit rate and false-alarm rate",
    "zero_miss": "no defect missed",
}  # fmt: skip
_FAIR_RATE = 256.0**-2  # of pixels (U-Flow's comparison of methods)


class Policy(NamedTuple):
    """Name a way to choose a threshold: percentile (value = q), fixed (v), others (None)."""

    name: str
    value: float | None


@dataclass(frozen=True)
class Threshold:
    """Hold a cut and its origin; score > value is a defect.

    target_rate: wanted share of false alarms; guaranteed_rate: upper bound of it for the next
    normal image, None where nothing is guaranteed; measured_rate: share of these normals above it,
    where that is not the rule itself; normals: number of normal images behind it.
    """

    value: float
    policy: str
    target_rate: float | None = None
    guaranteed_rate: float | None = None
    normals: int = 0
    measured_rate: float | None = None

    def __post_init__(self) -> None:
        _check_number("value", self.value, -math.inf, math.inf)
        object.__setattr__(self, "value", float(self.value))  # YAML reads 1.0 back as 1
        parse_policy(self.policy)
        for name in ("target_rate", "guaranteed_rate", "measured_rate"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, 1)
        if isinstance(self.normals, bool) or not isinstance(self.normals, int) or self.normals < 0:
            raise UserError(f"threshold normals {self.normals!r}: must be a whole number from 0")

    def to_dict(self) -> dict[str, float | str | int | None]:
        """Return plain values for JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Threshold":
        """Read what `to_dict` wrote; a UserError names the key that is missing, unknown or wrong.

        This is the only reader of stored thresholds.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"threshold {data!r}: must be a mapping with a value and a policy")
        known = [field.name for field in fields(cls)]
        if unknown := [str(key) for key in data if key not in known]:
            raise UserError(f"threshold: unknown key {unknown[0]!r}; known are {', '.join(known)}")
        if missing := [key for key in ("value", "policy") if key not in data]:
            raise UserError(f"threshold: key {missing[0]!r} is missing; export or calibrate again")
        return cls(**data)

    def describe(self) -> str:
        """Return one line for people: the value, its origin, the false-alarm rate it promises."""
        name, number = parse_policy(self.policy)
        if name == "fixed":
            origin = "fixed; nothing is known about its false-alarm rate"
        elif name == "nfa":
            alarms = round((self.measured_rate or 0) * self.normals)
            origin = "NFA below 1, so less than one false detection per image is expected; "
            origin += f"{alarms} of {self.normals} held-out normals had one"
        elif name == "fair":
            origin = f"one of 256² pixels of {self.normals} normals lies above"
        elif name in _ORACLES:
            origin = f"{_ORACLES[name]} on labelled images; an oracle if these are the test set"
        elif self.guaranteed_rate is None:
            origin = f"percentile {number:.15g} of the pixels of {self.normals} normals"
        else:
            origin = f"percentile {number:.15g} of {self.normals} normals; "
            origin += f"false-alarm rate at most {_percent(self.guaranteed_rate)}"
            if self.target_rate and self.guaranteed_rate > self.target_rate:
                needed = math.ceil(1 / Fraction(repr(self.target_rate))) - 1
                origin += f"; {needed} normals would be needed for {_percent(self.target_rate)}"
        return f"threshold {self.value:.4g} ({origin})"


def parse_policy(text: str, default_percentile: float = 99) -> Policy:
    """Read "percentile[:q]" with 0 < q <= 100, "fixed:v" or a name alone, else a UserError.

    Names are "nfa", "fair" and, from labelled images, "f1", "youden" and "zero_miss".
    """
    name, _, number = str(text).partition(":")
    if text in ("nfa", "fair", *_ORACLES):
        return Policy(name, None)
    if name == "percentile" and text == "percentile":
        number = str(default_percentile)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if name == "percentile" and 0 < value <= 100:
        return Policy(name, value)
    if name == "fixed" and math.isfinite(value):
        return Policy(name, value)
    raise UserError(
        f"threshold policy {text!r}: must be percentile:q (0 < q <= 100), fixed:v, nfa, fair or "
        "f1, for example percentile:99"
    )


def percentile(normal_scores: ArrayLike, q: float = 99) -> Threshold:
    """Choose the conformal threshold of held-out normal image scores (n, any shape).

    It is the k-th smallest score, k = min(n, ceil((n+1)·q/100)). If the next normal image is
    exchangeable with these, its score exceeds it with probability at most (n+1-k)/(n+1).
    """
    policy = _percentile_policy(q)
    scores = check_finite(np.asarray(normal_scores).reshape(-1), "scores of normal images")
    count = scores.size
    if count == 0:
        raise UserError("no scores of normal images: hold out at least one normal image")
    share = Fraction(repr(float(q))) / 100  # exact: in floats, 1000·0.999 may round up to rank 1000
    k = min(count, math.ceil((count + 1) * share))
    return Threshold(
        value=float(np.partition(scores, k - 1)[k - 1]),
        policy=policy,
        target_rate=float(1 - share),
        guaranteed_rate=(count + 1 - k) / (count + 1),
        normals=count,
    )


def pixel_percentile(maps: Sequence[NDArray] | NDArray, q: float = 99.9) -> Threshold:
    """Choose the ordinary percentile of all pixels of anomaly maps (H, W) of normal images.

    Pixels of one image are not exchangeable, so no rate is guaranteed.
    """
    policy = _percentile_policy(q)
    if len(maps) == 0:
        raise UserError("no anomaly maps of normal images: hold out at least one normal image")
    for index, anomaly_map in enumerate(maps):
        check_finite(anomaly_map, f"anomaly map of normal image {index}")
    pooled = np.concatenate([anomaly_map.reshape(-1) for anomaly_map in maps])
    # numpy would round a Python float q to the dtype of float32 maps: ranks off by one per million
    value = np.percentile(pooled, np.float64(q), overwrite_input=True)
    rate = float(1 - Fraction(repr(float(q))) / 100)
    return Threshold(float(value), policy, target_rate=rate, normals=len(maps))


def fair(maps: Sequence[NDArray] | NDArray) -> Threshold:
    """Choose U-Flow's fair threshold: 1 of 256² pixels of normal training images lies above it.

    Between two scores it is interpolated, as their false-positive rates are.
    """
    if len(maps) == 0:
        raise UserError("no anomaly maps of normal images: give at least one")
    for index, anomaly_map in enumerate(maps):
        check_finite(anomaly_map, f"anomaly map of normal image {index}")
    pooled = np.concatenate([np.asarray(m).reshape(-1) for m in maps])
    last = pooled.size - 1
    place = min(pooled.size * (1 - _FAIR_RATE), float(last))  # the k-th highest has a rate of k/n
    below = math.floor(place)
    above = min(below + 1, last)
    pooled.partition((below, above))  # in place: the maps may fill the memory
    low, high = float(pooled[below]), float(pooled[above])
    value = low + (place - below) * (high - low)
    return Threshold(value, "fair", target_rate=_FAIR_RATE, normals=len(maps))


def nfa(peaks: ArrayLike) -> Threshold:
    """Take NFA = 1, that is 0 on -log10 NFA, of whose maps (n,) are the maxima on normal images."""
    values = check_finite(np.asarray(peaks, np.float64).reshape(-1), "NFA of normal images")
    if values.size == 0:
        raise UserError("no NFA of normal images: hold out at least one normal image")
    return Threshold(0.0, "nfa", measured_rate=float((values > 0).mean()), normals=values.size)


def fixed(value: float) -> Threshold:
    """Take a number given by the user."""
    return Threshold(float(value), f"fixed:{float(value)!r}")


def f1(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """Choose the threshold of the largest F1 from labelled scores: an oracle on a test set.

    It lies halfway to the next lower score, because the best cut itself counts as a defect.
    Without a defective score it is the largest score, without a normal one the smallest (anomalib).
    """
    values, defective = checked(np.asarray(scores, dtype=np.float64), labels)
    if values.size == 0:
        raise UserError("no scores to choose a threshold from: give at least one labelled score")
    if not defective.any():
        value = float(values.max())
    elif defective.all():
        value = float(values.min())
    else:
        _, cut = f1_max(values, defective)
        value = _just_below(values, cut)
    return Threshold(value, "f1", normals=int(np.count_nonzero(~defective)))


def youden(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """Choose the threshold of the largest hit rate minus false-alarm rate, from labelled scores."""
    values, defective = _both_kinds(scores, labels)
    false_rate, true_rate, cuts = roc_curve(values, defective)
    cut = float(cuts[1:][np.argmax((true_rate - false_rate)[1:])])
    return Threshold(_just_below(values, cut), "youden", normals=int((~defective).sum()))


def zero_miss(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """Choose the largest threshold that misses no defect, from labelled scores."""
    values, defective = _both_kinds(scores, labels)
    cut = float(values[defective].min())
    return Threshold(_just_below(values, cut), "zero_miss", normals=int((~defective).sum()))


def _both_kinds(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray[np.bool_]]:
    values, defective = checked(np.asarray(scores, dtype=np.float64), labels)
    if not defective.any() or defective.all():
        raise UserError("scores of one kind only: give those of normal and of defective images")
    return values, defective


def _just_below(values: NDArray, cut: float) -> float:
    """Return a threshold that `cut` and nothing lower exceeds, half way to the next score."""
    lower = float(values[values < cut].max(initial=-np.inf))
    value = lower + (cut - lower) / 2
    return value if value < cut else math.nextafter(cut, -math.inf)  # nan, or no number between


@overload
def is_defective(score: float | np.floating, threshold: Threshold | float) -> bool: ...
@overload
def is_defective(score: NDArray, threshold: Threshold | float) -> NDArray[np.bool_]: ...
def is_defective(
    score: float | np.floating | NDArray, threshold: Threshold | float
) -> bool | NDArray[np.bool_]:
    """Return score > threshold for a number or an array; a tie is normal, NaN a UserError."""
    value = threshold.value if isinstance(threshold, Threshold) else threshold
    scores = check_finite(np.asarray(score), "scores")
    # numpy would round the threshold to float32 scores, and decide ties by that rounding
    verdict = scores > (_floor(value) if scores.dtype == np.float32 else np.float64(value))
    return verdict if scores.ndim else bool(verdict)


def _floor(value: float) -> np.float32:
    """Return the largest float32 that is not above a number: as many float32 exceed both."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    return nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf))


def _percentile_policy(q: float) -> str:
    return f"percentile:{parse_policy(f'percentile:{q}').value:.15g}"


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float | np.floating)
    if not (number and math.isfinite(value) and low <= value <= high):
        rule = "finite" if math.isinf(low) else f"between {low} and {high}"
        raise UserError(f"threshold {name} {value!r}: must be a number, {rule}")


def _percent(rate: float) -> str:
    # two digits, rounded up: "at most" must stay true
    percent = Context(prec=2, rounding=ROUND_CEILING).create_decimal(round(Decimal(rate) * 100, 9))
    return f"{percent.normalize():f} %"
