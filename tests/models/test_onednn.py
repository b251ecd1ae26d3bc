"""Convolution and copies by oneDNN: Paddle's numbers and gradients, or Paddle's own operators."""

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from models.flows import onednn, ops
from tests.small_run import REPO

needs_it = pytest.mark.skipif(not onednn.is_usable(), reason="no oneDNN in this Paddle")


def tensors(image, weight, *, seed=0):
    rng = np.random.default_rng(seed)
    shapes = image, weight, weight[:1]
    return [
        paddle.to_tensor(rng.standard_normal(shape).astype(np.float32), stop_gradient=False)
        for shape in shapes
    ]


def values(convolve, given, stride):
    y = convolve(*given, stride)
    gradients = paddle.grad((y * y * y).sum(), given)
    return [each.numpy() for each in (y, *gradients)]


def plainly(x, weight, bias, stride):
    padding = weight.shape[2] // 2
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, data_format="NHWC")


@needs_it
@pytest.mark.parametrize(
    ("image", "weight", "stride"),
    [
        ((1, 8, 8, 4), (6, 4, 3, 3), 1),
        ((3, 7, 5, 13), (8, 13, 3, 3), 2),
        ((2, 6, 9, 16), (32, 16, 1, 1), 1),
        ((2, 11, 11, 3), (5, 3, 5, 5), 1),
        ((2, 9, 7, 16), (32, 16, 3, 3), 1),
        ((1, 8, 9, 32), (16, 32, 5, 5), 2),
        ((1, 1, 2, 1), (1, 1, 3, 3), 1),
    ],
)
def test_the_same_as_paddle(image, weight, stride):
    expected = values(plainly, tensors(image, weight), stride)
    for _ in range(2):  # the second time with what the first one kept
        found = values(onednn.conv, tensors(image, weight), stride)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@needs_it
def test_gradients_only_where_they_are_wanted():
    x, weight, bias = tensors((1, 4, 4, 3), (2, 3, 3, 3))
    x.stop_gradient = True
    ops.conv(x, weight, bias).sum().backward()
    assert x.grad is None
    assert float(bias.grad.sum()) == 2 * 4 * 4
    x.stop_gradient, weight.stop_gradient, bias.stop_gradient = False, True, True
    ops.conv(x, weight, bias).sum().backward()
    assert np.abs(x.gradient()).sum() > 0


@needs_it
def test_arrays_that_are_not_contiguous():
    x, weight, bias = tensors((2, 4, 6, 5), (3, 5, 3, 3))
    turned = x.transpose([0, 2, 1, 3])
    expected = plainly(turned, weight, bias, 1)
    np.testing.assert_allclose(ops.conv(turned, weight, bias), expected, atol=1e-5)
    gradients = []
    for convolve in (plainly, ops.conv):
        y = convolve(x, weight, bias, 1).transpose([0, 2, 1, 3])[:, ::2]  # a gradient with holes
        gradients.append(paddle.grad(y.sum(), [x, weight, bias])[0].numpy())
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-5)


def test_it_steps_aside():
    x, weight, bias = tensors((1, 4, 4, 3), (2, 3, 3, 3))
    assert onednn.conv(x.astype("float64"), weight.astype("float64"), bias, 1) is None
    with onednn.left_out():
        assert onednn.conv(x, weight, bias, 1) is None
        np.testing.assert_array_equal(ops.conv(x, weight, bias), plainly(x, weight, bias, 1))


@pytest.mark.parametrize(
    "fault", ["no file", "another version", "wrong numbers", "wrong copies", "a refusal"]
)
def test_paddle_convolves_where_the_library_is_no_good(monkeypatch, fault):
    def refuse(*args):
        raise OSError("dnnl_engine_create returned 3")

    onednn._library.cache_clear()
    try:
        if fault == "no file":
            monkeypatch.setattr(onednn, "FILES", ("libnothing.so",))
        elif fault == "another version":
            monkeypatch.setattr(onednn, "MAJOR", 99)
        elif fault == "wrong numbers":
            monkeypatch.setattr(onednn, "TOLERANCE", -1.0)
        elif fault == "wrong copies":
            monkeypatch.setattr(onednn._Copy, "run", lambda *args: None)
        else:
            monkeypatch.setattr(onednn._Library, "make", refuse)
        x, weight, bias = tensors((1, 4, 4, 3), (2, 3, 3, 3))
        assert not onednn.is_usable()
        np.testing.assert_array_equal(ops.conv(x, weight, bias), plainly(x, weight, bias, 1))
    finally:
        onednn._library.cache_clear()


def test_the_switch():
    code = "from models.flows import onednn; print(onednn.is_usable())"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=True,
        env={"FLOWAD_ONEDNN": "0", "PATH": "", "HOME": str(REPO)},
    )  # fmt: skip
    assert child.stdout.strip() == "False"


def way(name):
    """Return a context in which oneDNN copies, or does not."""
    if name == "oneDNN" and not onednn.is_usable():
        pytest.skip("no oneDNN in this Paddle")
    return nullcontext() if name == "oneDNN" else onednn.left_out()


@pytest.mark.parametrize("name", ["oneDNN", "Paddle"])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5)])
def test_channels_are_split_and_joined(name, sizes):
    rng = np.random.default_rng(0)
    array = rng.standard_normal((2, 3, 4, 7)).astype(np.float32)
    x = paddle.to_tensor(array, stop_gradient=False)
    factors = paddle.arange(7, dtype="float32")
    with way(name):
        parts = ops.split(x, sizes)
        for part, group in zip(parts, np.split(array, np.cumsum(sizes)[:-1], axis=3), strict=True):
            np.testing.assert_array_equal(part, group)
        joined = ops.concat(parts)
        np.testing.assert_array_equal(joined, array)
        (joined * factors).sum().backward()
    np.testing.assert_array_equal(x.grad, np.broadcast_to(factors.numpy(), array.shape))


@pytest.mark.parametrize("name", ["oneDNN", "Paddle"])
def test_parts_that_are_not_contiguous_are_joined(name):
    array = np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5)
    turned = paddle.to_tensor(array).transpose([0, 2, 1, 3])
    with way(name):
        joined = ops.concat((turned, turned[..., :2]))
        groups = ops.split(turned, (1, 4))
    theirs = array.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(joined, np.concatenate([theirs, theirs[..., :2]], axis=3))
    np.testing.assert_array_equal(groups[1], theirs[..., 1:])


def test_parts_that_do_not_fit_are_for_paddle_to_refuse():
    x = paddle.ones([1, 2, 2, 3])
    with pytest.raises(ValueError, match=r"(?i)concat"):
        ops.concat((x, paddle.ones([1, 3, 2, 3])))
    assert onednn.split(x, (2, 2)) is None
    assert onednn.split(x, (3, 0)) is None
    assert onednn.concat((x, paddle.ones([1, 2, 2, 0]))) is None


@needs_it
def test_a_map_of_channels_is_a_convolution():
    x, weight, bias = tensors((2, 3, 5, 6), (4, 6, 1, 1))
    flat = weight.squeeze([2, 3]).transpose([1, 0]).contiguous().transpose([1, 0])  # a view
    for offset in (bias, None):
        wanted = [each for each in (x, flat, offset) if each is not None]
        results = []
        for name in ("oneDNN", "Paddle"):
            with way(name):
                y = ops.mix(x, flat, offset)
                found = [y, *paddle.grad((y * y).sum(), wanted)]
                results.append([each.numpy() for each in found])
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_joined_part_may_be_a_constant():
    x, constant = paddle.ones([1, 2, 2, 3]), paddle.ones([1, 2, 2, 2])
    x.stop_gradient = False
    ops.concat((x, constant)).sum().backward()
    assert float(x.grad.sum()) == 12
    assert constant.grad is None
