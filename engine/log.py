"""The log of a run: console and file lines, one JSON object per event, curves when asked for."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.curves import Board, Curves


class RunLog:
    """Write `train.log` and `log.jsonl` in the folder of a run, both appended to on resume."""

    def __init__(self, folder: Path, boards: Sequence[Board] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.curves = Curves(folder, boards)
        self._text = (folder / "train.log").open("a", encoding="utf-8", buffering=1)
        self._events = (folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)

    def say(self, message: str) -> None:
        """Print a line above the progress bar and append it to `train.log`."""
        tqdm.write(message)
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append one JSON line; draw its numbers over `step` on the boards."""
        self._events.write(json.dumps({"event": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.curves.number(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._text.close()
        self._events.close()
        self.curves.close()


class SilentLog(RunLog):
    """Write nothing: the log of a process that does not lead."""

    def __init__(self) -> None:
        """Open nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def training_cost(folder: Path) -> dict[str, float | None]:
    """Return seconds of all epochs and peak memory in MB of a run; None for what was not logged."""
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        # of an epoch that was cut off and run again, the last one counts
        epochs = {each["step"]: each["seconds"] for each in events if each["event"] == "epoch"}
        memory = [each["memory_mb"] for each in events if each["event"] == "done"]
    except (OSError, ValueError, KeyError, TypeError):
        epochs, memory = {}, []
    return {
        "training_seconds": round(sum(epochs.values()), 3) if epochs else None,
        "training_memory_mb": memory[-1] if memory else None,
    }
