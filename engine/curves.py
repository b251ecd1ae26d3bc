"""Curves of a training: numbers, pictures and distributions for VisualDL and TensorBoard."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

EDGES = np.linspace(-6, 6, 97)  # of the bins of a distribution


class Board(NamedTuple):
    """Who draws curves: its flag and package, and the folder of a run that its files go to."""

    flag: str
    package: str
    requirements: str
    folder: str
    bins: str  # what its add_histogram calls the edges of the bins
    writer: Callable[[], Any]  # gives the class that writes its files

    def load(self) -> Any:
        """Return the class that writes its files; `UserError` if it is not installed."""
        try:
            return self.writer()
        except ImportError:
            raise UserError(
                f"{self.flag}: {self.package} is not installed; pip install -r {self.requirements}"
            ) from None


def _visualdl() -> Any:
    from visualdl import LogWriter

    return LogWriter


def _tensorboard() -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter


BOARDS = (
    Board("--use_vdl", "VisualDL", "requirements-visualdl.txt", "vdl", "buckets", _visualdl),
    Board("--use_tb", "tensorboardX", "requirements-tensorboard.txt", "tb", "bins", _tensorboard),
)


def chosen_boards(flags: Mapping[str, Any]) -> list[Board]:
    """Return the boards whose flags are set; `UserError` for one that is not installed."""
    chosen = [board for board in BOARDS if flags[board.flag.lstrip("-")]]
    for board in chosen:
        board.load()
    return chosen


class Curves:
    """Write to all of some boards, in the folder of a run; to none of none."""

    def __init__(self, folder: Path, boards: Sequence[Board] = ()) -> None:
        self._writers = [(each, each.load()(str(folder / each.folder))) for each in boards]

    def number(self, name: str, value: float, step: int) -> None:
        """Add a point to the curve `name`."""
        for _, writer in self._writers:
            writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """Show a picture (H, W, 3)."""
        for _, writer in self._writers:
            writer.add_image(name, picture, step, dataformats="HWC")

    def distribution(self, name: str, values: NDArray[np.floating], step: int) -> None:
        """Show how often values occur; those beyond ±6 are in the first and the last bin."""
        inside = np.clip(values, EDGES[0], EDGES[-1])
        for board, writer in self._writers:
            writer.add_histogram(name, inside, step, **{board.bins: EDGES})

    def close(self) -> None:
        """Close the files."""
        for _, writer in self._writers:
            writer.close()
