"""The backbone through Paddle Inference: eager mode's features, or eager mode."""

import numpy as np
import paddle
import pytest

from engine import inputs, session
from models import fast_backbone
from models.fast_backbone import WORTHWHILE, FastBackbone
from models.flows import onednn
from tests.small_run import photographs, tiny_config

needs_it = pytest.mark.skipif(not onednn.is_usable(), reason="no oneDNN in this Paddle")


@pytest.fixture(scope="module")
def detector():
    return session.new_detector(tiny_config(), allow_random=False)[0]


@pytest.fixture(scope="module")
def images():
    return paddle.to_tensor(photographs(6, 64))


def arrays(levels):
    return [level.numpy() for level in levels]


@needs_it
def test_the_same_features(detector, images):
    fast = FastBackbone(detector)
    detector.train()
    first = fast(images[:4])
    expected = arrays(detector.features(images))
    kept = arrays(first)
    whole = fast(images)
    assert detector.training
    assert detector.flow.training
    for ours, theirs, before, again in zip(whole, expected, kept, arrays(first), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
        np.testing.assert_array_equal(before, again)  # not overwritten by the second run
        assert ours.stop_gradient
    assert fast._predictor is not None


@needs_it
def test_only_for_many_images_on_a_cpu(detector, monkeypatch):
    assert isinstance(detector.extractor(WORTHWHILE), FastBackbone)
    assert detector.extractor(WORTHWHILE - 1) == detector.features
    with onednn.left_out():
        assert detector.extractor(WORTHWHILE) == detector.features
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert detector.extractor(WORTHWHILE) == detector.features


@needs_it
@pytest.mark.parametrize("fault", ["wrong", "not a number", "refused", "no space"])
def test_eager_mode_where_it_fails(detector, images, monkeypatch, fault):
    class Predictor:
        def run(self, given):
            levels = detector.features(given[0])
            if fault == "refused":
                raise RuntimeError("operator < x > error")
            return [
                level * (float("nan") if fault == "not a number" else 1.001) for level in levels
            ]

    def predictor(*args):
        if fault == "no space":
            raise OSError(28, "No space left on device")
        return Predictor()

    monkeypatch.setattr(fast_backbone, "_predictor", predictor)
    fast = FastBackbone(detector)
    for ours, theirs in zip(fast(images), detector.features(images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert fast._predictor is None


@needs_it
def test_features_of_a_cache_come_through_it(detector, images, monkeypatch):
    made = []

    def predictor(*args):
        made.append(args)
        raise OSError

    monkeypatch.setattr(fast_backbone, "WORTHWHILE", 6)
    monkeypatch.setattr(fast_backbone, "_predictor", predictor)
    batches = [np.arange(3), np.arange(3, 6)]
    for part in (batches[:1], batches):
        list(inputs.extract_batches(detector, lambda rows: [images.numpy()[rows]], part))
    assert len(made) == 1
