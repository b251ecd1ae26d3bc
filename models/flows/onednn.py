"""Channels-last convolution, and cutting and joining of channels, by oneDNN in Paddle's wheel.

For eager mode on a CPU. Paddle's own convolution takes 1.3 to 3.7 times as long, its copies of
channels 1.6 to 8 times. The library has a documented C interface (oneDNN 3, `dnnl.h`), called here
through ctypes; it is used only where a self-check gives Paddle's numbers. `paddle.grad` of a part
of a convolution's inputs is refused by Paddle's PyLayer: `left_out()` allows it.
"""

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

SWITCH = "FLOWAD_ONEDNN"  # environment variable: 0 turns it off
FILES = ("libdnnl.so.3", "mkldnn.dll", "libdnnl.3.dylib")
MAJOR = 3
TOLERANCE = 1e-4  # relative to the largest value, in the self-check

# Values of dnnl_types.h and dnnl_common_types.h
_CPU, _IN_ORDER, _F32, _ANY = 1, 1, 3, 1
_TRAINING, _DIRECT = 64, 1  # kind of propagation, algorithm of convolution
_SRC, _DST, _WEIGHTS, _BIAS, _GRADIENT = 1, 17, 33, 41, 128  # arguments; + 128: of the gradient
_FROM, _TO = 1, 17
_QUERY = {"src": 129, "weights": 131, "diff_weights": 132, "diff_dst": 134}
_MOST_DIMENSIONS = 12
_BLOCK = 16  # channels in a block of the library's own orders

_in_use = True


class _Dims(ctypes.Array):
    _length_, _type_ = _MOST_DIMENSIONS, ctypes.c_int64


class _Argument(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Library:
    """The functions used here, with a status checked after each; and one stream on the CPU."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self.lock = threading.Lock()  # a plan is pointed at tensors, then run
        self._c.dnnl_version.restype = ctypes.POINTER(_Version)
        self._c.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        if self._c.dnnl_version().contents.major != MAJOR:
            raise OSError(f"{path}: not oneDNN {MAJOR}")
        self.engine = self.make("engine_create", _CPU, ctypes.c_size_t(0))
        self.stream = self.make("stream_create", self.engine, _IN_ORDER)

    def call(self, name: str, *arguments: Any) -> None:
        """Call dnnl_`name`; raise `OSError` if it refuses."""
        status = getattr(self._c, f"dnnl_{name}")(*arguments)
        if status:
            raise OSError(f"dnnl_{name} returned {status}")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that puts a new object into its first argument; return that."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def plain(self, shape: Sequence[int], strides: Sequence[int]) -> ctypes.c_void_p:
        """Describe a float32 array with the given strides."""
        return self.make(
            "memory_desc_create_with_strides", len(shape), _Dims(*shape), _F32, _Dims(*strides)
        )

    def any_order(self, shape: Sequence[int]) -> ctypes.c_void_p:
        """Describe a float32 array in whatever order the library likes best."""
        return self.make("memory_desc_create_with_tag", len(shape), _Dims(*shape), _F32, _ANY)

    def queried(self, description: ctypes.c_void_p, what: str) -> ctypes.c_void_p:
        """Return the order that was chosen for an array of a primitive."""
        found = self._c.dnnl_primitive_desc_query_md(description, _QUERY[what], 0)
        return ctypes.c_void_p(found)

    def memory(self, description: ctypes.c_void_p, *, own: bool = False) -> ctypes.c_void_p:
        """Make a handle of an array: with memory of its own, or pointed somewhere before use."""
        place = ctypes.c_void_p(-1 if own else 0)
        return self.make("memory_create", description, self.engine, place)


class _Step:
    """A primitive with its arguments; those without memory of their own are given at each run."""

    def __init__(
        self,
        library: _Library,
        description: ctypes.c_void_p,
        arguments: Sequence[tuple[int, ctypes.c_void_p]],
    ) -> None:
        self._library = library
        self._primitive = library.make("primitive_create", description)
        self._count = len(arguments)
        self._arguments = (_Argument * len(arguments))(*(_Argument(*each) for each in arguments))

    def run(self) -> None:
        self._library.call(
            "primitive_execute", self._primitive, self._library.stream, self._count, self._arguments
        )


def _reorder(
    library: _Library,
    given: ctypes.c_void_p,
    source: ctypes.c_void_p,
    wanted: ctypes.c_void_p,
    target: ctypes.c_void_p,
) -> _Step:
    """Return what copies an array from one order to another."""
    engine = library.engine
    description = library.make("reorder_primitive_desc_create", given, engine, wanted, engine, None)
    return _Step(library, description, [(_FROM, source), (_TO, target)])


class _Convolution:
    """Forward and backward of one shape; kept for as long as the process lives."""

    def __init__(
        self, library: _Library, image: tuple[int, ...], weight: tuple[int, ...], stride: int
    ) -> None:
        self.library = library
        batch, height, width, channels = image
        kernel = weight[2]
        pad = kernel // 2
        rows, columns = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
        self.output = (batch, rows, columns, weight[0])
        edges = (_Dims(stride, stride), _Dims(), _Dims(pad, pad), _Dims(pad, pad))
        source = _channels_last(library, image)
        target = _channels_last(library, self.output)
        bias = library.plain(weight[:1], (1,))
        order = library.plain(weight, (channels * kernel**2, kernel**2, kernel, 1))
        any_order = library.any_order(weight)

        forward = library.make(
            "convolution_forward_primitive_desc_create", library.engine, _TRAINING, _DIRECT,
            source, any_order, bias, target, *edges, None,
        )  # fmt: skip
        to_input = library.make(
            "convolution_backward_data_primitive_desc_create", library.engine, _DIRECT,
            source, any_order, target, *edges, forward, None,
        )  # fmt: skip
        free = kernel > 1 and channels % _BLOCK == weight[0] % _BLOCK == 0
        sides = (image, self.output)
        orders = [library.any_order(_first(s)) for s in sides] if free else [source, target]
        to_weight = library.make(
            "convolution_backward_weights_primitive_desc_create", library.engine, _DIRECT,
            orders[0], any_order, bias, orders[1], *edges, forward, None,
        )  # fmt: skip
        self.x, self.grad_x = library.memory(source), library.memory(source)
        self.y, self.bias = library.memory(target), library.memory(bias)
        self.weight = library.memory(order)
        forward_order = library.queried(forward, "weights")
        backward_order = library.queried(to_input, "weights")
        gradient_order = library.queried(to_weight, "diff_weights")
        ordered = library.memory(forward_order, own=True)
        self.forward_steps = (
            _reorder(library, order, self.weight, forward_order, ordered),
            _Step(library, forward, [
                (_SRC, self.x), (_WEIGHTS, ordered), (_BIAS, self.bias), (_DST, self.y),
            ]),
        )  # fmt: skip
        ordered = library.memory(backward_order, own=True)
        self.input_steps = (
            _reorder(library, order, self.weight, backward_order, ordered),
            _Step(library, to_input, [
                (_SRC + _GRADIENT, self.grad_x), (_WEIGHTS, ordered), (_DST + _GRADIENT, self.y),
            ]),
        )  # fmt: skip
        ordered = library.memory(gradient_order, own=True)
        x, y, first = self.x, self.y, []
        if free:  # half to nine tenths of the time, with the copies
            orders = [library.queried(to_weight, name) for name in ("src", "diff_dst")]
            x, y = (library.memory(each, own=True) for each in orders)
            first = [
                _reorder(library, source, self.x, orders[0], x),
                _reorder(library, target, self.y, orders[1], y),
            ]
        self.weight_steps = (
            *first,
            _Step(library, to_weight, [
                (_SRC, x), (_DST + _GRADIENT, y), (_WEIGHTS + _GRADIENT, ordered),
                (_BIAS + _GRADIENT, self.bias),
            ]),
            _reorder(library, gradient_order, ordered, order, self.weight),
        )  # fmt: skip

    def run(self, steps: Sequence[_Step], tensors: dict[str, Tensor]) -> None:
        """Point the arrays of these names at tensors, and run."""
        with self.library.lock:
            for name, tensor in tensors.items():
                place = ctypes.c_void_p(tensor.data_ptr())
                self.library.call("memory_set_data_handle", getattr(self, name), place)
            for step in steps:
                step.run()
            self.library.call("stream_wait", self.library.stream)


class _Copy:
    """Copy a group of channels out of longer rows, or into them; kept like a convolution."""

    def __init__(
        self, library: _Library, rows: int, channels: int, total: int, *, inwards: bool
    ) -> None:
        self._library = library
        shape = (rows, channels)
        alone, among = library.plain(shape, (channels, 1)), library.plain(shape, (total, 1))
        self._alone, self._among = library.memory(alone), library.memory(among)
        given, wanted = (alone, among) if inwards else (among, alone)
        source, target = (self._alone, self._among) if inwards else (self._among, self._alone)
        self._step = _reorder(library, given, source, wanted, target)

    def run(self, group: Tensor, whole: Tensor, start: int) -> None:
        """Copy between a group and the channels of the whole from number `start` on."""
        places = (self._alone, group.data_ptr()), (self._among, whole.data_ptr() + 4 * start)
        with self._library.lock:
            for memory, place in places:
                self._library.call("memory_set_data_handle", memory, ctypes.c_void_p(place))
            self._step.run()
            self._library.call("stream_wait", self._library.stream)


def _channels_last(library: _Library, shape: Sequence[int]) -> ctypes.c_void_p:
    _, height, width, channels = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return library.plain(_first(shape), strides)


def _first(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape as oneDNN counts it, channels before rows and columns."""
    batch, height, width, channels = shape
    return batch, channels, height, width


class _Convolve(PyLayer):
    """The convolution as a differentiable operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, plan: _Convolution) -> Tensor:
        y = paddle.empty(plan.output, "float32")
        plan.run(plan.forward_steps, {"x": x, "weight": weight, "bias": bias, "y": y})
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.bias_shape = plan, bias.shape
        ctx.wanted = [not each.stop_gradient for each in (x, weight, bias)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensor()
        plan, grad = ctx.plan, grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.wanted[0]:
            grad_x = paddle.empty(x.shape, "float32")
            plan.run(plan.input_steps, {"grad_x": grad_x, "weight": weight, "y": grad})
        if ctx.wanted[1] or ctx.wanted[2]:
            grad_weight = paddle.empty(weight.shape, "float32")
            grad_bias = paddle.empty(ctx.bias_shape, "float32")
            arrays = {"x": x, "y": grad, "weight": grad_weight, "bias": grad_bias}
            plan.run(plan.weight_steps, arrays)
        found = zip((grad_x, grad_weight, grad_bias), ctx.wanted, strict=True)
        return tuple(each if wanted else None for each, wanted in found)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor | None:
    """Convolve (B, H, W, C) with zero "same" padding; None where this is not the way to do it."""
    if not _takes(x) or weight.dtype != x.dtype:
        return None
    bias = paddle.zeros([weight.shape[0]], "float32") if bias is None else bias
    plan = _plan(tuple(x.shape), tuple(weight.shape), stride)
    return _Convolve.apply(*(each.contiguous() for each in (x, weight, bias)), plan)


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Cut the last axis into consecutive groups; None where this is not the way to do it."""
    if not _takes(x) or sum(sizes) != x.shape[-1] or min(sizes) < 1:
        return None
    x, rows = x.contiguous(), x.size // x.shape[-1]
    parts = tuple(paddle.empty([*x.shape[:-1], size], "float32") for size in sizes)
    for part, end in zip(parts, itertools.accumulate(sizes), strict=True):
        size = part.shape[-1]
        _copy(rows, size, x.shape[-1], inwards=False).run(part, x, end - size)
    return parts


def concat(parts: Sequence[Tensor]) -> Tensor | None:
    """Join along the last axis; None where this is not the way to do it."""
    places = parts[0].shape[:-1]
    if not all(_takes(part) and part.shape[:-1] == places for part in parts):
        return None
    sizes = [part.shape[-1] for part in parts]
    joined = paddle.empty([*parts[0].shape[:-1], sum(sizes)], "float32")
    for part, end in zip(parts, itertools.accumulate(sizes), strict=True):
        size = part.shape[-1]
        copy = _copy(part.size // size, size, sum(sizes), inwards=True)
        copy.run(part.contiguous(), joined, end - size)
    return joined


def _takes(x: Tensor) -> bool:
    usable = x.place.is_cpu_place() and x.dtype == paddle.float32 and x.size > 0
    return bool(usable) and is_usable()


def is_usable() -> bool:
    """Tell whether the library is there, allowed, and gives Paddle's numbers."""
    return _in_use and _library() is not None


@contextmanager
def left_out() -> Iterator[None]:
    """Compute with Paddle's own operators inside."""
    global _in_use
    kept, _in_use = _in_use, False
    try:
        yield
    finally:
        _in_use = kept


@functools.cache
def _library() -> _Library | None:
    """Return the library, if it is there, allowed, and right."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    folder = Path(paddle.__file__).parent / "libs"
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        library = _Library(path)
        return library if _convolves(library) and _copies(library) else None
    except (OSError, AttributeError):  # another version, or a function is missing
        return None


def _copies(library: _Library) -> bool:
    """Cut channels out of a small example, and put them back."""
    whole = paddle.arange(24, dtype="float32").reshape([4, 6])
    group, joined = paddle.zeros([4, 2]), paddle.zeros([4, 6])
    _Copy(library, 4, 2, 6, inwards=False).run(group, whole, 3)
    _Copy(library, 4, 2, 6, inwards=True).run(group, joined, 1)
    right = np.array_equal(group, whole.numpy()[:, 3:5])
    return right and np.array_equal(joined, np.pad(group.numpy(), ((0, 0), (1, 3))))


def _convolves(library: _Library) -> bool:
    """Compare the convolution and its gradients with Paddle's on seeded examples, of both kinds."""
    small = (2, 9, 7, 5), (6, 5, 3, 3), (6,)
    in_blocks = (2, 5, 6, _BLOCK), (2 * _BLOCK, _BLOCK, 3, 3), (2 * _BLOCK,)
    return all(_convolves_as_paddle(library, shapes) for shapes in (small, in_blocks))


def _convolves_as_paddle(library: _Library, shapes: Sequence[tuple[int, ...]]) -> bool:
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    results = []
    with paddle.enable_grad(), paddle.amp.auto_cast(enable=False):
        for plan in (None, _Convolution(library, shapes[0], shapes[1], 1)):
            x, weight, bias = (paddle.to_tensor(each, stop_gradient=False) for each in given)
            if plan is None:
                y = F.conv2d(x, weight, bias, padding=1, data_format="NHWC")
            else:
                y = _Convolve.apply(x, weight, bias, plan)
            gradients = paddle.grad((y * y).sum(), [x, weight, bias])
            results.append([each.numpy() for each in (y, *gradients)])
    return all(
        bool(np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max())
        for theirs, ours in zip(*results, strict=True)
    )


@functools.lru_cache(maxsize=512)
def _plan(image: tuple[int, ...], weight: tuple[int, ...], stride: int) -> _Convolution:
    library = _library()
    assert library is not None
    return _Convolution(library, image, weight, stride)


@functools.lru_cache(maxsize=512)
def _copy(rows: int, channels: int, total: int, *, inwards: bool) -> _Copy:
    library = _library()
    assert library is not None
    return _Copy(library, rows, channels, total, inwards=inwards)
