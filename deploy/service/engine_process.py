"""An engine in a process of its own, which may crash or hang without harm to the service.

Paddle also keeps Python's global lock while it runs on a CPU: in this process it would stop
everything else, and no batch would form.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bundle import read_bundle
from deploy.choice import create_engine
from deploy.engines import EngineOptions
from utils import runtime
from utils.errors import UserError
from utils.predictions import Output

ENDING_SECONDS = 5


class EngineLost(Exception):
    """The process of an engine ended, or was ended because it did not answer."""


class EngineProcess:
    """Start an engine, run it, end it; each but `kill` by one thread at a time.

    It is warmed up with batches of `counts` images, and given `seconds` for each later one.
    """

    def __init__(
        self, bundle: Path, options: EngineOptions, counts: Sequence[int], seconds: float
    ) -> None:
        self._given = bundle, options, tuple(counts)
        self._seconds = seconds
        self._pipe: Connection | None = None
        self._process: Any = None

    def start(self) -> str:
        """Start anew; return how the engine was chosen. `UserError` as `create_engine`."""
        self.kill()
        context = multiprocessing.get_context("spawn")  # threads do not survive a fork
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, *self._given), daemon=True)
        self._process.start()
        other.close()
        return self._answer(None)

    def run(self, images: np.ndarray) -> Output:
        """Run it on images (B, 3, H, W) as `Engine.run`; `EngineLost` if it has to start anew."""
        if self._pipe is None:
            raise EngineLost("the engine has no process")
        try:
            self._pipe.send(images)
        except OSError:
            raise self._lost() from None
        return self._answer(self._seconds)

    def close(self) -> None:
        """End the process when it has run what it was given."""
        if self._pipe is not None:
            self._pipe.close()  # the process ends by that
            self._process.join(ENDING_SECONDS)
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _answer(self, seconds: float | None) -> Any:
        assert self._pipe is not None
        try:
            if not self._pipe.poll(seconds):
                self.kill()
                raise EngineLost(f"no answer of the engine within {seconds:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if kind == "ok":
            return value
        raise UserError(value) if kind == "user" else RuntimeError(value)

    def _lost(self) -> EngineLost:
        self._process.join(ENDING_SECONDS)
        return EngineLost(f"the process of the engine ended with code {self._process.exitcode}")


def _work(
    pipe: Connection, folder: Path, options: EngineOptions, counts: Sequence[int]
) -> None:  # in the process
    _stay()
    try:
        runtime.prepare()
        bundle = read_bundle(folder)
        engine, note = create_engine(bundle, options)
        for count in counts:  # first runs of a shape are slow
            engine.run(np.zeros((count, 3, *bundle.input_size), np.float32))
    except UserError as error:
        pipe.send(("user", str(error)))
        return
    _stay()  # Paddle puts in handlers of its own
    pipe.send(("ok", note))
    while True:
        try:
            images = pipe.recv()
        except EOFError:  # the service closed its end, or is gone
            return
        try:
            pipe.send(("ok", engine.run(images)))
        except OSError:  # the service is gone
            return
        except Exception as error:
            pipe.send(("fault", f"{type(error).__name__}: {error}"))


def _stay() -> None:
    """Leave it to the service when to end: signals often go to all of its processes."""
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)
