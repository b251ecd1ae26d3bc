"""Published figures: they fit their own means, and say what they are comparable with."""

from statistics import fmean

import pytest

from metrics.suite import evaluate
from models.backbones import BACKBONES
from utils.names import CATEGORIES
from utils.published import Size, difference, sources
from utils.schema import MODEL_SECTIONS

EVERY = [source for flow in MODEL_SECTIONS for source in sources(flow)]
METRICS = {*evaluate([0.1, 0.9], [0, 1]).values, "miou_nfa", "miou_nfa_oracle"}
# Two printed means are not those of the printed figures: a fault of the source, or of rounding.
TOLERANCE = {("cait_m48_448", "aupro_0.3"): 2e-3, ("wide_resnet50_2", "pixel_auroc"): 6e-4}


@pytest.mark.parametrize("source", EVERY, ids=lambda s: f"{s.title} {s.backbone}")
def test_figures_are_fractions_and_have_the_printed_mean(source):
    categories = {name: values for name, values in source.values.items() if name != "mean"}
    assert set(categories) in (set(CATEGORIES), set())
    assert {key for values in source.values.values() for key in values} <= METRICS
    assert all(0 < v <= 1 for values in source.values.values() for v in values.values())
    assert source.note
    assert source.backbone in BACKBONES or source.backbone == "mcait"
    for key, mean in source.values.get("mean", {}).items():
        own = [values[key] for values in categories.values()]
        tolerance = TOLERANCE.get((source.backbone, key), 5.1e-4)
        assert not own or fmean(own) == pytest.approx(mean, abs=tolerance)


def test_every_method_has_published_figures():
    assert {source.flow for source in EVERY} == set(MODEL_SECTIONS)


def test_the_size_of_the_data_set():
    """Its paper counts 3,629 training images, 467 good and 1,258 defective test images."""
    from utils.published import _sizes

    assert set(_sizes()) == set(CATEGORIES)
    assert [sum(column) for column in zip(*_sizes().values(), strict=True)] == [3629, 467, 1258]


def test_what_is_comparable():
    assert difference("bottle", Size(209, 20, 63)) == ""
    assert difference("Bottle", Size(None, 20, 63)) == ""  # where the training is not known
    assert difference("bottle", Size(120, 20, 63)) == "120 of 209 training images"
    assert difference("metal nut", Size(220, 10, 93)) == "10 of 22 good test images"
    assert difference("bottle", Size(209, 10, 32)) == (
        "10 of 20 good test images, 32 of 63 defective test images"
    )
    assert difference("cap", Size(1, 2, 3)) == "not a category of MVTec AD"
