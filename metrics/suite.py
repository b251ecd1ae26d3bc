"""All metrics of one test set in one call, with the reason wherever one is undefined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metrics import curves
from metrics.aupro import RegionPixels, aupro_of_ranking, region_pixels
from metrics.curves import Curve
from metrics.iou import (
    best_miou,
    iou_of_counts,
    miou_of_counts,
    overlap_at_threshold,
    pixel_counts,
    threshold_grid,
)
from metrics.pixels import NO_DEFECTIVE, NO_MASK, Maps, Masks, check_maps, sorted_background
from metrics.roc import Ranking, checked, f1_of_counts, rank, rank_labelled
from metrics.threshold import Threshold, f1, is_defective, youden, zero_miss
from utils.errors import UserError

Results = dict[str, float | str]  # by metric: its value, or the reason why it is undefined

_RANKED = ("auroc", "ap", "f1_max")
_VERDICTS = ("image_tp", "image_fp", "image_tn", "image_fn", "image_f1")
_RATES = ("false_alarm_rate", "miss_rate")
_ORACLES = (
    "youden_threshold", "youden_overkill", "youden_miss", "zero_miss_threshold",
    "zero_miss_overkill", "f1_threshold",
)  # fmt: skip
_PIXEL_CUT = ("pixel_f1", "iou", "miou", "pro")
_NO_NORMAL = "test set has no normal images"
_NO_NFA = "threshold of policy nfa, but no NFA maps"


@dataclass(frozen=True)
class Metrics:
    """Hold every metric by name (nan where undefined), why it is nan, and what to warn about.

    curves: image_roc, image_pr, pixel_roc, pixel_pr and overlap, without those that are undefined.
    """

    values: dict[str, float]
    reasons: dict[str, str]
    warnings: list[str]
    curves: dict[str, Curve] = field(default_factory=dict)

    def with_pixels(
        self, values: Mapping[str, float | str], warnings: Sequence[str] = ()
    ) -> "Metrics":
        """Return these with pixel metrics, or reasons for want of them, from elsewhere."""
        known = {name: self.reasons.get(name, value) for name, value in self.values.items()}
        return _split(known | dict(values), [*self.warnings, *warnings], self.curves)


def evaluate(
    image_scores: ArrayLike,
    image_labels: ArrayLike,
    maps: Maps | None = None,
    masks: Masks | None = None,
    image_threshold: Threshold | float | None = None,
    pixel_threshold: Threshold | float | None = None,
    aupro_limits: Sequence[float] = (0.3, 0.05),
    names: Sequence[str] | None = None,
    allow_missing_masks: bool = False,
    nfa_maps: Maps | None = None,
) -> Metrics:
    """Compute every metric of N images; the keys are the same whatever is undefined.

    image_scores, image_labels: (N,), label 1 = defective. maps, masks: N of (H, W), defective where
    mask > 0; a mask is None for a normal image, or where it is missing. names: N, for messages.
    A defective image without a mask leaves the pixel metrics undefined, or is left out of them
    with `allow_missing_masks`. nfa_maps: N of -log10 NFA (H, W), on which the keys with nfa rest,
    and what thresholds of policy nfa decide; without them its keys are left out. `miou_oracle` is
    the best of 1,000 quantiles of all pixels. UserError: lengths, shapes, labels other than 0 and
    1, NaN.
    """
    names = [f"image {i}" for i in range(np.size(image_scores))] if names is None else names
    _check_scores(np.ravel(image_scores), names)
    scores, defective = checked(image_scores, image_labels)
    results, drawn = _image_ranking(scores, defective)
    results |= _oracles(scores, defective)
    masks = [None] * scores.size if masks is None else masks
    with_nfa = nfa_maps is not None
    peaks = None
    if nfa_maps is not None:
        _check_maps(nfa_maps, masks, names, "NFA")
        peaks = np.array([float(nfa_map.max()) for nfa_map in nfa_maps])
        alarms = peaks[~defective] > 0
        results["nfa_false_alarm_rate"] = float(alarms.mean()) if alarms.size else _NO_NORMAL
    decisive = peaks if _policy(image_threshold) == "nfa" else scores
    results |= _verdicts(decisive, defective, image_threshold)
    if maps is None:
        undefined = _undefined_pixels("no anomaly maps", aupro_limits, with_nfa)
        return _split(results | undefined, [], drawn)
    _check_maps(maps, masks, names, "anomaly")
    marked = [None if mask is None else bool((mask > 0).any()) for mask in masks]
    missing, reason, warnings = examine_masks(marked, defective, names, allow_missing_masks)
    if reason:
        undefined = _undefined_pixels(reason, aupro_limits, with_nfa)
        return _split(results | undefined, warnings, drawn)
    if missing:
        kept = [i for i in range(scores.size) if i not in set(missing)]
        maps, masks = [maps[i] for i in kept], [masks[i] for i in kept]
        nfa_maps = [nfa_maps[i] for i in kept] if nfa_maps is not None else None
    found, pixels_drawn = _pixels(
        maps, masks, pixel_threshold, aupro_limits, bool(defective.any()), nfa_maps
    )
    return _split(results | found, warnings, drawn | pixels_drawn)


def _check_scores(scores: NDArray, names: Sequence[str]) -> None:
    if scores.size != len(names):
        raise UserError(f"{scores.size} image scores but {len(names)} names: give one each")
    broken = np.flatnonzero(~np.isfinite(scores)).tolist()
    if broken:
        raise UserError(
            f"score of {_listed(broken, names)} is NaN or infinite; "
            "a sound model gives finite numbers, so check the weights and the input"
        )


def _check_maps(maps: Maps, masks: Masks, names: Sequence[str], kind: str) -> None:
    if len(maps) != len(names):
        raise UserError(f"{len(names)} image scores but {len(maps)} {kind} maps: give one each")
    check_maps(maps, masks, names, kind)


def _image_ranking(
    scores: NDArray, defective: NDArray[np.bool_]
) -> tuple[Results, dict[str, Curve]]:
    if not defective.any():
        return {f"image_{name}": NO_DEFECTIVE for name in _RANKED}, {}
    ranking = rank_labelled(scores, defective)
    return {
        "image_auroc": _NO_NORMAL if defective.all() else ranking.auroc(),
        "image_ap": ranking.average_precision(),
        "image_f1_max": ranking.f1_max()[0],
    }, _curves(ranking, "image")


def _curves(ranking: Ranking, kind: str) -> dict[str, Curve]:
    if not (ranking.positives.size and ranking.negatives):
        return {}
    return {
        f"{kind}_roc": curves.roc(ranking), f"{kind}_pr": curves.precision_recall(ranking),
    }  # fmt: skip


def _verdicts(
    scores: NDArray | None, defective: NDArray[np.bool_], threshold: Threshold | float | None
) -> Results:
    if threshold is None or scores is None:
        reason = "no image threshold" if threshold is None else _NO_NFA
        return dict.fromkeys((*_VERDICTS, *_RATES), reason)
    found = is_defective(scores, threshold)
    tp, fp = int((found & defective).sum()), int((found & ~defective).sum())
    bad = int(defective.sum())
    good = defective.size - bad
    counts: Results = {"image_tp": tp, "image_fp": fp, "image_tn": good - fp, "image_fn": bad - tp}
    return counts | {
        "image_f1": float(f1_of_counts(tp, fp, bad - tp)) if bad else NO_DEFECTIVE,
        "false_alarm_rate": fp / good if good else _NO_NORMAL,
        "miss_rate": (bad - tp) / bad if bad else NO_DEFECTIVE,
    }


def _pixels(
    maps: Maps,
    masks: Masks,
    threshold: Threshold | float | None,
    limits: Sequence[float],
    any_defective: bool,
    nfa_maps: Maps | None,
) -> tuple[Results, dict[str, Curve]]:
    inside = region_pixels(maps, masks)
    results, drawn = _pixel_ranking(maps, masks, inside, limits)
    results |= _best_overlap(maps, masks, nfa_maps)
    if threshold is None:
        results |= dict.fromkeys(_PIXEL_CUT, "no pixel threshold")
    elif _policy(threshold) == "nfa" and nfa_maps is None:
        results |= dict.fromkeys(_PIXEL_CUT, _NO_NFA)
    else:
        if _policy(threshold) == "nfa" and nfa_maps is not None:
            maps, inside = nfa_maps, region_pixels(nfa_maps, masks)
        counts = pixel_counts(maps, masks, threshold)
        results |= {
            "pixel_f1": float(f1_of_counts(*(c.sum() for c in counts))),
            "iou": iou_of_counts(counts),
            "miou": miou_of_counts(counts) if len(maps) else NO_MASK,
            "pro": overlap_at_threshold(inside, threshold),
        }
    if not inside.regions:  # only mIoU can do without
        reason = "masks mark no defective pixels" if any_defective else NO_DEFECTIVE
        results |= {key: reason for key in results if "miou" not in key}
    return results, drawn


def _policy(threshold: Threshold | float | None) -> str:
    return threshold.policy if isinstance(threshold, Threshold) else ""


def _oracles(scores: NDArray, defective: NDArray[np.bool_]) -> Results:
    """Return over-kill and miss rates at the thresholds that the Korean fork of CS-Flow prints."""
    if not defective.any() or defective.all():
        return dict.fromkeys(_ORACLES, _NO_NORMAL if defective.any() else NO_DEFECTIVE)
    results: Results = {}
    for name, choose in (("youden", youden), ("zero_miss", zero_miss), ("f1", f1)):
        cut = choose(scores, defective)
        found = is_defective(scores, cut)
        results[f"{name}_threshold"] = cut.value
        results[f"{name}_overkill"] = float(found[~defective].mean())
        results[f"{name}_miss"] = float((~found[defective]).mean())
    return {key: results[key] for key in _ORACLES}


def _best_overlap(maps: Maps, masks: Masks, nfa_maps: Maps | None) -> Results:
    """Return mIoU at the best threshold, and of NFA maps at 0 and at the best threshold."""
    if not len(maps):
        nfa_keys = ("miou_nfa", "miou_nfa_oracle") if nfa_maps is not None else ()
        return dict.fromkeys(("miou_oracle", *nfa_keys), NO_MASK)
    results: Results = {"miou_oracle": best_miou(maps, masks, threshold_grid(maps))}
    if nfa_maps is not None:
        results["miou_nfa"] = miou_of_counts(pixel_counts(nfa_maps, masks, 0.0))
        # the grid of U-Flow's code of 2024
        results["miou_nfa_oracle"] = best_miou(nfa_maps, masks, np.arange(-400.0, 1001.0))
    return results


def _pixel_ranking(
    maps: Maps, masks: Masks, inside: RegionPixels, limits: Sequence[float]
) -> tuple[Results, dict[str, Curve]]:
    ranking = rank(inside.scores, sorted_background(maps, masks))
    areas = aupro_of_ranking(ranking, inside.weights, limits)
    none = None if ranking.negatives else "masks leave no normal pixels"
    drawn = _curves(ranking, "pixel")
    if drawn:
        drawn["overlap"] = curves.overlap(ranking, inside.weights)
    return {
        "pixel_auroc": none or ranking.auroc(),
        "pixel_ap": ranking.average_precision(),
        "pixel_f1_max": ranking.f1_max()[0],
        **{f"aupro_{limit:g}": none or area for limit, area in areas.items()},
    }, drawn


def _undefined_pixels(reason: str, limits: Sequence[float], with_nfa: bool) -> Results:
    ranked = [f"pixel_{name}" for name in _RANKED] + [f"aupro_{limit:g}" for limit in limits]
    nfa_keys = ("miou_nfa", "miou_nfa_oracle") if with_nfa else ()
    return dict.fromkeys((*ranked, *_PIXEL_CUT, "miou_oracle", *nfa_keys), reason)


def examine_masks(
    marked: Sequence[bool | None],
    defective: NDArray[np.bool_],
    names: Sequence[str],
    allow_missing: bool,
) -> tuple[list[int], str, list[str]]:
    """Return which defective images have no mask, why there are no pixel metrics, and warnings.

    marked: whether a mask marks anything, None where there is none. The reason is empty if there
    are pixel metrics, as with `allow_missing`.
    """
    bad = np.flatnonzero(defective).tolist()
    missing = [i for i in bad if marked[i] is None]
    empty = [i for i in bad if marked[i] is False]
    wrong = [i for i in np.flatnonzero(~defective).tolist() if marked[i]]
    warnings = []
    if empty:
        warnings.append(f"empty mask, so no region, for {_listed(empty, names)}")
    if wrong:
        warnings.append(f"masks mark defects, though labelled normal, for {_listed(wrong, names)}")
    if missing and allow_missing:
        warnings.append(f"pixel metrics leave out {_listed(missing, names)}: no ground-truth mask")
    reason = f"no ground-truth mask for {_listed(missing, names)}" if missing else ""
    return missing, "" if allow_missing else reason, warnings


def _listed(indices: Sequence[int], names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(str(names[i]) for i in indices[:most])
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{len(indices)} image{'s' * (len(indices) > 1)} ({shown}{more})"


def _split(results: Results, warnings: list[str], drawn: dict[str, Curve]) -> Metrics:
    reasons = {name: value for name, value in results.items() if isinstance(value, str)}
    values = {
        name: float("nan") if isinstance(value, str) else float(value)
        for name, value in results.items()
    }
    return Metrics(values, reasons, warnings, drawn)
