"""What a detector costs: parameters, multiplications and memory of every part."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import paddle
from paddle import Tensor, _C_ops, nn
from paddle.base import core

from .detector import Detector
from .flows import onednn
from .references import published_count

MB = 10**6
STATISTICS = ("_mean", "_variance")  # of batch norms; parameters in Paddle alone
OTHER = "other"  # what runs between the parts
LEGEND = """
Input {height}×{width}, one image, on the CPU. 1 MB is 10^6 bytes of Paddle's tensors.
MACs: multiply-adds of convolutions and matrix products, with constants folded as for export.
weights: parameters and stored constants.
inference: the most memory in use beside the weights while a part runs.
training: what a part keeps for the gradients, for each image of a batch, on whole maps; gradients
and Adam's moments take {adam:,.1f} MB more, whatever the batch.
"""


@dataclass
class Cost:
    """Count what one part takes; bytes, and multiply-adds for one image."""

    parameters: int = 0
    trained: int = 0
    macs: int = 0
    weights: int = 0
    inference: int = 0
    training: int = 0


class Summary(NamedTuple):
    """Hold the costs by part; of `flow` and `total`, inference memory is the largest of a part."""

    size: tuple[int, int]  # of the image, height and width
    parts: dict[str, Cost]
    flow: Cost
    total: Cost


def summarise(detector: Detector) -> Summary:
    """Measure a detector on one random image, on the CPU.

    It runs three times and is folded, so that it can be neither trained nor saved afterwards.
    """
    layers = _parts(detector)
    parts = {name: _stored(group) for name, group in layers.items()} | {OTHER: Cost()}
    image = paddle.rand([1, 3, *detector.input_size])
    detector.eval()
    with paddle.no_grad(), _counted(parts, layers, _in_use()):
        features = detector.features(image)
    with _kept(parts, layers):
        detector.objective(features)
    detector.flow.fold()
    own = _in_use() - sum(_bytes(feature) for feature in features)
    with paddle.no_grad(), _counted(parts, layers, own):
        detector.score(features)
    parts = {name: cost for name, cost in parts.items() if cost.parameters or cost.macs}
    flow = [cost for name, cost in parts.items() if name.startswith("flow")]
    return Summary(detector.input_size, parts, _sum(flow), _sum(parts.values()))


def render(summary: Summary, model: Mapping[str, Any]) -> str:
    """Return a Markdown table and what its columns mean; `model` is the section of this name."""
    rows = [(name, cost, "") for name, cost in summary.parts.items()]
    place = max(i for i, (name, *_) in enumerate(rows) if name.startswith("flow")) + 1
    rows.insert(place, ("flow, all", summary.flow, published_count(model)))
    rows.append(("total", summary.total, ""))
    titles = ("part", "parameters", "trained", "MACs", "weights", "inference", "training")
    table = [[*titles, "published"]]
    for name, cost, published in rows:
        counts = [f"{count:,}" for count in (cost.parameters, cost.trained)]
        sizes = [f"{size / MB:,.1f} MB" for size in (cost.weights, cost.inference, cost.training)]
        table.append([name, *counts, f"{cost.macs / 10**6:,.1f} M", *sizes, published or "–"])
    height, width = summary.size
    adam = 12 * summary.total.trained / MB  # a gradient and two moments, 4 bytes each
    return "\n".join(_aligned(table)) + "\n" + LEGEND.format(height=height, width=width, adam=adam)


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        cells = [
            cell.ljust(width) if place in (0, len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def _parts(detector: Detector) -> dict[str, list[nn.Layer]]:
    """Name the parts in the order in which they run, each with the layers that are called."""
    parts: dict[str, list[nn.Layer]] = {"backbone": [detector.backbone]}
    for name, group in detector.flow.named_children():
        if name in ("levels", "blocks"):
            for number, member in enumerate(group, 1):
                layers = list(member) if isinstance(member, nn.LayerList) else [member]
                parts[f"flow, {name[:-1]} {number}"] = layers
        else:
            parts[name] = list(group) if isinstance(group, nn.LayerList) else [group]
    extra = [detector.evidence] if detector.evidence is not None else []
    return parts | {"scorer": [detector.scorer, *extra]}


def _stored(layers: Sequence[nn.Layer]) -> Cost:
    cost = Cost()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if not name.endswith(STATISTICS):
                cost.parameters += int(parameter.size)
            cost.trained += 0 if parameter.stop_gradient else int(parameter.size)
        cost.weights += sum(_bytes(tensor) for tensor in layer.state_dict().values())
    return cost


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        for name, value in vars(cost).items():
            joined = max if name == "inference" else int.__add__
            setattr(total, name, joined(getattr(total, name), value))
    return total


def _bytes(tensor: Tensor) -> int:
    return int(tensor.size) * int(tensor.element_size())


def _in_use() -> int:
    return int(core.host_memory_stat_current_value("Allocated", 0))


@contextmanager
def _watched(
    layers: Mapping[str, Sequence[nn.Layer]],
    begin: Callable[[str], None],
    end: Callable[[str], None],
) -> Iterator[None]:
    """Call `begin` and `end` with the name of a part whenever one of its layers runs."""
    hooks = []
    for name, group in layers.items():
        for layer in group:
            # the hook's result would replace the layer's input or output
            before = layer.register_forward_pre_hook(lambda *_, name=name: begin(name))
            after = layer.register_forward_post_hook(lambda *_, name=name: end(name))
            hooks += [before, after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _kept(parts: dict[str, Cost], layers: Mapping[str, Sequence[nn.Layer]]) -> Iterator[None]:
    """Add what stays in memory after the parts have run."""

    def begin(name: str) -> None:
        parts[name].training -= _in_use()

    def end(name: str) -> None:
        parts[name].training += _in_use()

    with _watched(layers, begin, end):
        yield


@contextmanager
def _counted(
    parts: dict[str, Cost], layers: Mapping[str, Sequence[nn.Layer]], own: int
) -> Iterator[None]:
    """Add multiply-adds, and the most memory in use beyond `own` bytes."""
    running = OTHER

    def begin(name: str) -> None:
        nonlocal running
        running = name
        core.host_memory_stat_reset_peak_value("Allocated", 0)

    def end(name: str) -> None:
        nonlocal running
        running = OTHER
        peak = int(core.host_memory_stat_peak_value("Allocated", 0))
        parts[name].inference = max(parts[name].inference, peak - own)

    def add(macs: int) -> None:
        parts[running].macs += macs

    with _watched(layers, begin, end), _tapped(add), onednn.left_out():
        yield


@contextmanager
def _tapped(add: Callable[[int], None]) -> Iterator[None]:
    """Report the multiply-adds of every product that Paddle computes in eager mode.

    All of its layers, and ours, come down to the few functions in `_MACS`.
    """
    kept = {name: getattr(_C_ops, name) for name in _MACS}

    def tap(name: str) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = kept[name](*args, **kwargs)
            add(_MACS[name](result, *args, **kwargs))
            return result

        return call

    try:
        for name in kept:
            setattr(_C_ops, name, tap(name))
        yield
    finally:
        for name, function in kept.items():
            setattr(_C_ops, name, function)


def _of_convolution(result: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(result.size) * (int(weight.size) // int(weight.shape[0]))  # (C_out, C_in/g, k, k)


def _of_product(
    result: Tensor, x: Tensor, y: Tensor, transpose_x: bool = False, *args: Any, **kwargs: Any
) -> int:
    return int(result.size) * int(x.shape[-2 if transpose_x else -1])


def _of_linear(result: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(result.size) * int(x.shape[-1])


_MACS: dict[str, Callable[..., int]] = {
    "conv2d": _of_convolution,
    "depthwise_conv2d": _of_convolution,
    "matmul": _of_product,
    "linear": _of_linear,
    "linear_v2": _of_linear,
}
