"""Time one thing while one size of it grows: case <what>, <size> <value>."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.bench_metrics import draw, ours
from benchmarks.bench_nfa import score_maps
from benchmarks.measure import Call, own_arguments, report


@dataclass(frozen=True)
class Sizes:
    """The sizes that are not growing."""

    images: int = 100
    side: int = 32  # of a feature map
    pixels: int = 128  # along the side of an anomaly map
    channels: int = 64
    batch: int = 8


def metrics(sizes: Sizes) -> Call:
    """Return all metrics of a test set."""
    maps, masks, labels = draw(sizes.images, sizes.pixels)
    return lambda: {"auroc": ours(maps, masks, labels)["pixel_auroc"]}


def nfa(sizes: Sizes) -> Call:
    """Return the a-contrario test on one scale."""
    score = score_maps(((sizes.channels, sizes.side, sizes.side),))["ours"]
    return lambda: {"highest": float(score().max())}


def flow_step(sizes: Sizes) -> Call:
    """Return a training step of one level of FastFlow."""
    import paddle

    from models.flows.fastflow import FastFlow

    side, channels = sizes.side, sizes.channels
    rng = np.random.default_rng(0)
    flow = FastFlow(
        [channels], [(side, side)], steps=8, hidden_ratio=1.0, conv3x3_only=True,
        coupling="one_sided", clamp="tanh", alpha=2.0, norm="layer", norm_momentum=0.9,
        global_scale="softplus", loss_norm="per_element", init="torch", rng=rng,
    )  # fmt: skip
    features = rng.standard_normal((sizes.batch, channels, side, side), dtype=np.float32)
    given = paddle.to_tensor(features)
    adam = paddle.optimizer.Adam(1e-3, parameters=flow.parameters())

    def step() -> dict[str, float]:
        loss = flow.loss(*flow([given]))
        loss.backward()
        adam.step()
        adam.clear_grad(set_to_zero=False)
        return {"loss": loss.item()}

    return step


WHAT: dict[str, Callable[[Sizes], Call]] = {
    "metrics": metrics, "NFA": nfa, "FastFlow step": flow_step,
}  # fmt: skip


def main() -> None:
    """Measure a case."""
    options = own_arguments(__doc__)
    what, _, size = options.case.partition(", ")
    name, _, value = size.partition(" ")
    report(WHAT[what](replace(Sizes(), **{name: int(value)})), options.repeat)


if __name__ == "__main__":
    main()
