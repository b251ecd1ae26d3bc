"""Training by several processes: each has a part of every batch, and together they take one step.

Started by `python -m paddle.distributed.launch`, on GPUs, or on CPUs with `--backend gloo`. Losses
and gradients are those of one process with the whole batch, to rounding. One process leads: it
alone writes files and looks at held-out and test images.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from utils.errors import UserError


@dataclass(frozen=True)
class Part:
    """The rows of a batch that a process works on: `first` is the place of the first of them.

    `share` is how much of the batch they are. With share 0 there is one row all the same, which is
    another process's too and counts for nothing: every process takes part in every step.
    """

    rows: np.ndarray
    first: int
    total: int
    share: float


class Team:
    """The processes of one training, as one of them sees them; `Team()` is a process alone."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.idle = False  # in this step

    @property
    def leads(self) -> bool:
        """Tell whether this process writes the files."""
        return self.rank == 0

    def part(self, batch: np.ndarray) -> Part:
        """Return this process's part of a batch of indices; the parts are as equal as can be."""
        edges = [len(batch) * i // self.size for i in (self.rank, self.rank + 1)]
        rows = batch[edges[0] : edges[1]]
        if len(rows) == 0:
            return Part(batch[:1], len(batch), len(batch), 0.0)
        return Part(rows, edges[0], len(batch), len(rows) / len(batch))

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the values of all processes, in float64."""
        if self.size == 1:
            return list(values)
        return self.add(paddle.to_tensor(np.array(values, np.float64))).tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, in place of the one given."""
        if self.size > 1:
            _together(lambda: dist.all_reduce(tensor))
        return tensor

    def leaders(self, values: Sequence[float]) -> list[float]:
        """Return the values of the leading process."""
        return self.total(values if self.leads else [0.0] * len(values))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put in the place of every gradient the sum over all processes."""
        for parameter in parameters:
            if self.size > 1 and parameter.grad is not None:
                self.add(parameter.grad)

    def wait(self) -> None:
        """Return when all processes have come to this point."""
        self.total([0.0])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the processes through one after the other: what the first writes the others find."""
        for turn in range(self.size):
            if turn == self.rank:
                yield
            self.wait()

    def check_same(self, what: str, digest: str) -> None:
        """Raise `UserError` unless all processes have the same hexadecimal digest."""
        ours = [float(int(digest[i : i + 8], 16)) for i in range(0, 32, 8)]
        if self.total(ours) != [value * self.size for value in self.leaders(ours)]:
            raise UserError(
                f"{what} differ between the processes of this training; make them equal"
            )


class SharedBatchNorm(nn.BatchNorm2D):
    """Normalise with the statistics of the whole batch, whichever process has its images.

    For features of a frozen backbone: no gradient flows back through the statistics.
    """

    def __init__(self, norm: nn.BatchNorm2D, team: Team) -> None:
        super().__init__(norm._num_features, momentum=norm._momentum, epsilon=norm._epsilon)
        self.set_state_dict(norm.state_dict())
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with paddle.no_grad():
            mean, variance = self._statistics(x)  # (1, C, 1, 1)
            keep = self._momentum
            for kept, new in ((self._mean, mean), (self._variance, variance)):
                kept.set_value(kept * keep + new.reshape([-1]) * (1.0 - keep))
            normal = (x - mean) * paddle.rsqrt(variance + self._epsilon)
        return normal * self.weight.reshape([1, -1, 1, 1]) + self.bias.reshape([1, -1, 1, 1])

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = self.team.total([0.0 if self.team.idle else x.size / x.shape[1]])[0]
        mean = self._total(x) / count
        centred = x - mean
        return mean, self._total(centred * centred) / count  # biased, as Paddle's own

    def _total(self, x: Tensor) -> Tensor:
        """Return the sum of every channel over all processes, (1, C, 1, 1)."""
        own = x.sum(3, keepdim=True).sum(2, keepdim=True).sum(0, keepdim=True)
        return self.team.add(own * 0.0 if self.team.idle else own)


def join(device: str) -> Team:
    """Meet the other processes, if the launcher started this one among several."""
    size = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    if size < 2:
        return Team()
    if device == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    _together(dist.init_parallel_env)
    return Team(dist.get_rank(), dist.get_world_size())


def share_norms(network: nn.Layer, team: Team) -> None:
    """Let the batch norms that train take their statistics from all processes."""
    for name, layer in list(network.named_sublayers()):
        if isinstance(layer, nn.BatchNorm2D) and not layer.weight.stop_gradient:
            owner, _, last = name.rpartition(".")
            holder = network.get_sublayer(owner) if owner else network
            setattr(holder, last, SharedBatchNorm(layer, team))


def _together(action: Callable[[], object]) -> None:
    """Do what needs all processes; `UserError` if one of them is gone."""
    try:
        action()
    except (RuntimeError, OSError, ValueError, SystemError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(
            f"another process of this training has ended or cannot be reached ({reason[0]}); its "
            "reason is in its own log (workerlog.N of the launcher); then go on with --resume"
        ) from None
