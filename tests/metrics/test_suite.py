"""The one call that computes everything: agreement with single metrics, degenerate test sets."""

import math
import tracemalloc

import numpy as np
import pytest

from metrics import iou, roc
from metrics.aupro import aupro
from metrics.suite import Metrics, evaluate
from metrics.threshold import fixed, nfa
from utils.errors import UserError

PIXEL = {
    *("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3", "aupro_0.05"),
    *("pixel_f1", "iou", "miou", "pro", "miou_oracle"),
}
ORACLES = (
    *("youden_threshold", "youden_overkill", "youden_miss"),
    *("zero_miss_threshold", "zero_miss_overkill", "f1_threshold"),
)
IMAGE = {
    *("image_auroc", "image_ap", "image_f1_max", "image_tp", "image_fp", "image_tn", "image_fn"),
    *("image_f1", "false_alarm_rate", "miss_rate", *ORACLES),
}


@pytest.fixture
def case() -> dict:
    """Return a test set of 5 defective and 3 normal images (8, 32, 24) with masks."""
    rng = np.random.default_rng(11)
    labels = np.array([1, 1, 0, 1, 0, 1, 0, 1])
    masks = np.zeros((8, 32, 24), dtype=np.uint8)
    masks[labels == 1, 5:15, 4:12] = masks[labels == 1, 20:25, 15:18] = 255
    maps = (rng.standard_normal(masks.shape) + (masks > 0)).astype(np.float32)
    scores = rng.standard_normal(8) + labels
    return {"image_scores": scores, "image_labels": labels, "maps": maps, "masks": masks}


def undefined(result: Metrics) -> set[str]:
    """Return the names of undefined metrics, having checked that nan and reasons agree."""
    names = {name for name, value in result.values.items() if math.isnan(value)}
    assert names == set(result.reasons)
    return names


def test_equals_the_single_metrics(case):
    maps, masks = case["maps"], case["masks"]
    scores, labels = case["image_scores"], case["image_labels"]
    result = evaluate(**case, image_threshold=0.4, pixel_threshold=fixed(0.6))
    assert set(result.values) == IMAGE | PIXEL
    assert not undefined(result)
    assert not result.warnings
    expected = {
        "image_auroc": roc.auroc(scores, labels),
        "image_ap": roc.average_precision(scores, labels),
        "image_f1_max": roc.f1_max(scores, labels)[0],
        "pixel_auroc": roc.auroc(maps, masks > 0),
        "pixel_ap": roc.average_precision(maps, masks > 0),
        "pixel_f1_max": roc.f1_max(maps, masks > 0)[0],
        "aupro_0.3": aupro(maps, masks)[0.3],
        "aupro_0.05": aupro(maps, masks)[0.05],
        "iou": iou.iou(maps, masks, 0.6),
        "miou": iou.miou(maps, masks, 0.6),
        "pro": iou.pro_at_threshold(maps, masks, 0.6),
    }
    for name, value in expected.items():
        assert result.values[name] == pytest.approx(value, abs=1e-12), name
    found, true = maps > 0.6, masks > 0
    dice = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert result.values["pixel_f1"] == pytest.approx(dice, abs=1e-9)


def test_verdicts():
    result = evaluate([0.1, 0.5, 0.9, 0.5, 0.6], [0, 0, 0, 1, 1], image_threshold=0.5).values
    counts = [result[f"image_{name}"] for name in ("tp", "fp", "tn", "fn")]
    assert counts == [1, 1, 2, 1]  # a score on the threshold is normal
    assert result["false_alarm_rate"] == pytest.approx(1 / 3)
    assert result["miss_rate"] == 0.5
    assert result["image_f1"] == pytest.approx(0.5)


def test_lists_and_masks_left_out_for_normal_images(case):
    full = evaluate(**case, pixel_threshold=0.5)
    case["maps"] = list(case["maps"])
    labels = case["image_labels"]
    case["masks"] = [m if y else None for m, y in zip(case["masks"], labels, strict=True)]
    assert evaluate(**case, pixel_threshold=0.5).values == pytest.approx(full.values, nan_ok=True)


def test_other_aupro_limits(case):
    result = evaluate(**case, aupro_limits=(0.1,))
    assert result.values["aupro_0.1"] == aupro(case["maps"], case["masks"], (0.1,))[0.1]
    assert "aupro_0.3" not in result.values


def test_without_thresholds_or_maps(case):
    result = evaluate(case["image_scores"], case["image_labels"])
    assert set(result.values) == IMAGE | PIXEL
    assert undefined(result) == (IMAGE | PIXEL) - {
        *("image_auroc", "image_ap", "image_f1_max"),
        *ORACLES,
    }
    assert result.reasons["miss_rate"] == "no image threshold"
    assert result.reasons["pixel_auroc"] == "no anomaly maps"
    result = evaluate(**case, image_threshold=0.5)
    assert undefined(result) == {"pixel_f1", "iou", "miou", "pro"}
    assert result.reasons["miou"] == "no pixel threshold"


def test_no_defective_images(case):
    case["image_labels"] = np.zeros(8)
    case["masks"] = None
    case["maps"] = case["maps"].copy()
    case["maps"][0] = -9
    result = evaluate(**case, image_threshold=0.5, pixel_threshold=0.5)
    defined = {"image_tp", "image_fp", "image_tn", "image_fn", "false_alarm_rate", "miou"}
    assert undefined(result) == (IMAGE | PIXEL) - defined - {"miou_oracle"}
    assert set(result.reasons.values()) == {"test set has no defective images"}
    assert result.values["miou"] == pytest.approx(1 / 8)  # the share of images without detection


def test_no_normal_images(case):
    kept = case["image_labels"] == 1
    case = {name: value[kept] for name, value in case.items()}
    result = evaluate(**case, image_threshold=0.5, pixel_threshold=0.5)
    assert undefined(result) == {"image_auroc", "false_alarm_rate", *ORACLES}
    assert set(result.reasons.values()) == {"test set has no normal images"}


def test_no_normal_pixels():
    result = evaluate([1.0], [1], np.ones((1, 4, 4)), np.ones((1, 4, 4)), 0.5, 0.5)
    expected = {"image_auroc", "false_alarm_rate", "pixel_auroc", "aupro_0.3", "aupro_0.05"}
    assert undefined(result) == expected | set(ORACLES)
    assert result.reasons["aupro_0.3"] == "masks leave no normal pixels"


@pytest.mark.parametrize("masks", ["none", "one"])
def test_missing_masks_undo_pixel_metrics(case, masks):
    case["masks"] = None if masks == "none" else [*case["masks"][:7], None]
    result = evaluate(**case, pixel_threshold=0.5, image_threshold=0.5, names=list("abcdefgh"))
    assert undefined(result) == PIXEL
    missing = "5 images (a, b, d, f, h)" if masks == "none" else "1 image (h)"
    assert set(result.reasons.values()) == {f"no ground-truth mask for {missing}"}


def test_missing_masks_can_be_allowed(case):
    expected = evaluate(
        case["image_scores"][:7], case["image_labels"][:7], case["maps"][:7], case["masks"][:7]
    )
    case["masks"] = [*case["masks"][:7], None]
    result = evaluate(**case, allow_missing_masks=True)
    for name in ("pixel_auroc", "pixel_ap", "aupro_0.3"):
        assert result.values[name] == expected.values[name]
    assert result.values["image_auroc"] != expected.values["image_auroc"]
    assert result.warnings == ["pixel metrics leave out 1 image (image 7): no ground-truth mask"]


def test_all_masks_missing_but_allowed(case):
    case["masks"] = None
    result = evaluate(**case, pixel_threshold=99, image_threshold=0, allow_missing_masks=True)
    assert undefined(result) == PIXEL - {"miou", "miou_oracle"}
    assert result.values["miou"] == 1  # three normal images, nothing found
    single = evaluate([1.0], [1], np.ones((1, 2, 2)), None, 0, 0, allow_missing_masks=True)
    assert single.reasons["miou"] == "no image has a ground-truth mask"
    undefined(single)


def test_empty_mask_of_a_defective_image(case):
    case["masks"][0] = 0
    result = evaluate(**case, pixel_threshold=0.5, image_threshold=0.5)
    assert not undefined(result)
    assert result.warnings == ["empty mask, so no region, for 1 image (image 0)"]
    assert result.values["image_tp"] + result.values["image_fn"] == 5  # its label stays
    case["masks"][:] = 0
    result = evaluate(**case, pixel_threshold=0.5, image_threshold=0.5)
    assert undefined(result) == PIXEL - {"miou", "miou_oracle"}
    assert set(result.reasons.values()) == {"masks mark no defective pixels"}


def test_mask_of_a_normal_image_that_marks_defects(case):
    case["masks"][2, 0, 0] = 1
    (warning,) = evaluate(**case).warnings
    assert "labelled normal" in warning
    assert "image 2" in warning


def test_constant_maps(case):
    case["maps"] = np.full_like(case["maps"], 0.7)
    case["image_scores"] = np.full(8, 0.7)
    values = evaluate(**case).values
    assert values["image_auroc"] == values["pixel_auroc"] == 0.5
    assert values["aupro_0.3"] == pytest.approx(0.15)
    assert values["aupro_0.05"] == pytest.approx(0.025)


def test_empty_test_set():
    result = evaluate([], [], [], [], 0.5, 0.5)
    assert undefined(result) == (IMAGE | PIXEL) - {"image_tp", "image_fp", "image_tn", "image_fn"}


def test_errors_name_the_image(case):
    names = [f"test/bad/{i:03}.png" for i in range(8)]
    case["maps"][3, 1, 1] = np.nan
    with pytest.raises(UserError, match=r"test/bad/003.png: 1 of 768 values are NaN"):
        evaluate(**case, names=names)
    case["image_scores"][6] = np.inf
    with pytest.raises(UserError, match=r"score of 1 image \(test/bad/006.png\) is NaN"):
        evaluate(**case, names=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.zeros((7, 32, 24))}, "8 image scores but 7 anomaly maps"),
        ({"masks": np.zeros((7, 32, 24))}, "8 anomaly maps but 7 masks"),
        ({"image_labels": np.zeros(7)}, "8 scores but 7 labels"),
        ({"names": ["a"]}, "8 image scores but 1 names"),
        ({"masks": np.zeros((8, 64, 48))}, "resize masks"),
        ({"image_labels": np.full(8, -1)}, "label -1"),
    ],
)
def test_mismatches_are_errors(case, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(**(case | change))


def test_memory_stays_below_three_times_the_maps():
    rng = np.random.default_rng(0)
    maps = rng.random((40, 128, 128), dtype=np.float32)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[30:60, 40:60] = 1
    masks = [mask] * 30 + [None] * 10
    labels = np.arange(40) < 30
    tracemalloc.start()
    evaluate(labels * 1.0, labels, maps, masks, 0.5, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * maps.nbytes  # beside the maps themselves


# --- thresholds that use test labels, and the a-contrario maps


def test_over_kill_and_misses_of_the_oracles():
    """Normals 1, 2, 5 and defects 3, 4, 6: Youden's cut lies below 3, the zero-miss one too."""
    values = evaluate([1, 2, 5, 3, 4, 6], [0, 0, 0, 1, 1, 1]).values
    assert values["youden_threshold"] == values["zero_miss_threshold"] == 2.5
    assert values["youden_overkill"] == values["zero_miss_overkill"] == pytest.approx(1 / 3)
    assert values["youden_miss"] == 0
    values = evaluate([1, 2, 5, 0, 6, 7], [0, 0, 0, 1, 1, 1]).values
    assert (values["youden_threshold"], values["youden_overkill"]) == (5.5, 0)
    assert values["youden_miss"] == pytest.approx(1 / 3)
    assert values["zero_miss_threshold"] < 0
    assert values["zero_miss_overkill"] == 1


def nfa_case() -> dict:
    """Return two defective images, one found exactly and one not, and a normal with an alarm."""
    masks = np.zeros((4, 8, 8), np.uint8)
    masks[:2, 2:5, 2:5] = 1
    nfa = np.full((4, 8, 8), -3.0)
    nfa[0, 2:5, 2:5] = 2.0
    nfa[1, 2:5, 2:5] = -0.5
    nfa[2, 7, 7] = 1.0
    return {
        "image_scores": [0.1, 0.1, 0.9, 0.9], "image_labels": [1, 1, 0, 0],
        "maps": np.random.default_rng(0).random((4, 8, 8)), "masks": masks, "nfa_maps": nfa,
    }  # fmt: skip


def test_nfa_maps():
    values = evaluate(**nfa_case(), image_threshold=0.5, pixel_threshold=0.5).values
    assert values["miou_nfa"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert values["miou_nfa_oracle"] == pytest.approx(3 / 4)  # at -1: both defects, one alarm
    assert values["nfa_false_alarm_rate"] == 0.5
    assert values["false_alarm_rate"] == 1  # verdicts are those of the score


def test_nfa_thresholds_decide_on_nfa_maps():
    cut = nfa([-3.0, 1.0])
    values = evaluate(**nfa_case(), image_threshold=cut, pixel_threshold=cut).values
    assert values["miou"] == values["miou_nfa"]
    assert values["pro"] == pytest.approx(0.5)
    assert (values["false_alarm_rate"], values["miss_rate"]) == (0.5, 0.5)
    assert values["image_auroc"] == 0  # ranks the scores, as ever


def test_nfa_thresholds_without_nfa_maps(case):
    """0 means nothing on the scale of scores."""
    cut = nfa([-1.0])
    result = evaluate(**case, image_threshold=cut, pixel_threshold=cut)
    assert undefined(result) == {
        *("image_tp", "image_fp", "image_tn", "image_fn", "image_f1"),
        *("false_alarm_rate", "miss_rate", "pixel_f1", "iou", "miou", "pro"),
    }
    assert set(result.reasons.values()) == {"threshold of policy nfa, but no NFA maps"}
    assert not any("nfa" in key for key in result.values)


def test_nfa_maps_alone():
    case = nfa_case()
    del case["maps"], case["masks"]
    result = evaluate(**case, image_threshold=nfa([-1.0]))
    assert (result.values["image_tp"], result.values["image_fp"]) == (1, 1)
    assert result.values["nfa_false_alarm_rate"] == 0.5
    assert result.reasons["miou_nfa"] == result.reasons["miou_nfa_oracle"] == "no anomaly maps"


def test_nfa_of_defects_only():
    case = {name: value[:2] for name, value in nfa_case().items()}
    result = evaluate(**case)
    assert result.reasons["nfa_false_alarm_rate"] == "test set has no normal images"
    assert result.values["miou_nfa"] == pytest.approx(0.5)


def test_nfa_leaves_out_images_without_masks():
    case = nfa_case()
    case["masks"] = [None, *case["masks"][1:]]
    values = evaluate(**case, allow_missing_masks=True, pixel_threshold=nfa([0.0])).values
    assert values["miou_nfa"] == values["miou"] == pytest.approx((0 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((3, 8, 8)), "4 image scores but 3 NFA maps"),
        (np.zeros((4, 9, 8)), "mask of image 0: .* its NFA map has .9, 8."),
        (np.full((4, 8, 8), np.nan), "NFA map of image 0: 64 of 64 values"),
    ],
)
def test_unfit_nfa_maps(maps, message):
    with pytest.raises(UserError, match=message):
        evaluate(**(nfa_case() | {"nfa_maps": maps}))


def test_the_best_miou_is_no_less_than_any_other(case):
    best = evaluate(**case).values["miou_oracle"]
    each = [evaluate(**case, pixel_threshold=t).values["miou"] for t in np.linspace(-1, 5, 31)]
    assert best >= max(each) - 0.005  # of 1,000 thresholds, not of all


def test_nfa_without_masks():
    case = nfa_case()
    case["masks"] = None
    result = evaluate(**case)
    assert {"miou_nfa", "miou_nfa_oracle"} <= undefined(result)
    assert result.values["nfa_false_alarm_rate"] == 0.5
