"""One thread per engine that runs images which wait together as one batch."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np

from deploy.service import logs
from deploy.service.engine_process import EngineLost
from utils.predictions import Found, Output

CLOSING_SECONDS = 60  # for what was submitted to be run when the service stops
RESTART_SECONDS = 2  # between attempts


class Runs(Protocol):
    """What an engine can do, as far as the worker is concerned: see `EngineProcess`."""

    def start(self) -> str: ...

    def run(self, images: np.ndarray) -> Output: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...


class Batch(NamedTuple):
    """How many images an engine ran at once, for how long, and if that failed."""

    images: int
    seconds: float
    failed: bool


class _Job(NamedTuple):
    image: np.ndarray  # (3, h, w)
    done: "Future[Found]"


class Worker:
    """Start an engine and run it in one thread; the order is that of arrival.

    `most` images are run at once at most. A batch waits up to `patience` seconds for more images;
    with 0 it is what came while the engine was busy. `ready` tells how the engine was chosen.
    """

    def __init__(
        self,
        name: str,
        engine: Runs,
        *,
        most: int,
        patience: float = 0.0,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.name, self.most, self.patience = name, most, patience
        self.seconds_per_image = 0.0  # lately
        self.ready: Future[str] = Future()
        self._engine, self._on_batch = engine, on_batch
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._restarting = False
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)

    @property
    def state(self) -> str:
        """Return starting (again, if it was lost), ok, or failed: it could not be started."""
        if not self.ready.done() or self._restarting:
            return "starting"
        return "ok" if self.ready.exception() is None else "failed"

    def start(self) -> None:
        """Start the engine, and run what is submitted."""
        self._thread.start()

    def submit(self, image: np.ndarray) -> "Future[Found]":
        """Queue one image (3, h, w); a result that is cancelled while it waits is not computed."""
        job = _Job(image, Future())
        with self._changed:
            if self._closing:
                raise RuntimeError(f"the worker of {self.name} is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.done

    def close(self) -> None:
        """Run what was submitted, then end the engine and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.state == "starting":
            self._engine.kill()
        if self._thread.is_alive():
            self._thread.join(CLOSING_SECONDS)
        self._engine.kill()

    def _work(self) -> None:
        try:
            note = self._engine.start()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(note)
        while jobs := self._next():
            self._run(jobs)
        self._engine.close()

    def _next(self) -> list[_Job]:
        """Wait for images; empty when the worker is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            self._changed.wait_for(
                lambda: len(self._jobs) >= self.most or self._closing, self.patience
            )
            return [self._jobs.popleft() for _ in range(min(self.most, len(self._jobs)))]

    def _run(self, jobs: list[_Job]) -> None:
        wanted = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        if not wanted:
            return
        start = time.monotonic()
        failure: Exception | None = None
        try:
            output = self._engine.run(np.stack([job.image for job in wanted]))
        except Exception as error:
            failure = error
            logs.event("engine failed", level=logging.ERROR, model=self.name, error=str(error))
        seconds = time.monotonic() - start
        self._on_batch(Batch(len(wanted), seconds, failure is not None))
        self.seconds_per_image += 0.2 * (seconds / len(wanted) - self.seconds_per_image)
        self._restarting = isinstance(failure, EngineLost)
        for place, job in enumerate(wanted):
            if failure is not None:
                job.done.set_exception(failure)
                continue
            job.done.set_result(output.of(place))
        if self._restarting:
            self._restart()

    def _restart(self) -> None:
        """Start the engine anew, again and again until it starts or the worker is closed."""
        while not self._closing:
            try:
                self._engine.start()
                logs.event("engine restarted", model=self.name)
                break
            except Exception as error:
                logs.event("no engine", level=logging.ERROR, model=self.name, error=str(error))
                time.sleep(RESTART_SECONDS)
        self._restarting = False
