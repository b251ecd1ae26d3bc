"""The models that are served: from files in memory to verdicts, and how far each one is."""

import asyncio
import base64
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np

from deploy.bundle import Bundle
from deploy.service.body import Sent
from deploy.service.limits import Limits, Places, Refusal
from deploy.service.metrics import Metrics
from deploy.service.worker import Batch, Runs, Worker
from metrics.drift import Drift
from utils.errors import UserError
from utils.image import Size, TooManyPixels, decode_image, to_input
from utils.predictions import Found, Judge
from utils.visualize import heat_map

MAP_SIDE = 1024  # of heat maps in answers, pixels: the network's own map is smaller
T = TypeVar("T")


class _Ready(NamedTuple):
    name: str
    size: Size  # of the original
    network_input: np.ndarray


class Model:
    """A bundle, the worker that runs it, and the places for images that wait."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        engine: Runs,
        limits: Limits,
        metrics: Metrics,
        *,
        most: int,
        patience: float,
    ) -> None:
        self.name, self.bundle = name, bundle
        self.places = Places(limits.waiting)
        self.worker = Worker(name, engine, most=most, patience=patience, on_batch=self._count)
        self._judge = Judge(bundle.image_threshold, bundle.pixel_threshold, bundle.acontrario)
        self._limits, self._metrics = limits, metrics
        metrics.waiting.labels(name).set_function(lambda: self.places.taken)
        self._drift = None if bundle.nll is None else Drift(bundle.nll)
        if self._drift is not None:
            drift = self._drift
            metrics.nll.labels(name).set_function(lambda: drift.mean)
            metrics.drift.labels(name).set_function(lambda: drift.z)
            metrics.drift_alarm.labels(name).set_function(lambda: float(drift.alarm))

    @contextmanager
    def accepted(self) -> Iterator[Callable[[int], None]]:
        """Hold one place; the function that is yielded takes further ones. `Refusal` if full."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if not self.places.take(count):
                wait = self.places.taken * self.worker.seconds_per_image
                raise Refusal(
                    503, f"{self.places.taken} of {self.places.most} places of {self.name} are "
                    "taken; try again later, or with fewer images",
                    retry_after=max(1, math.ceil(wait)),
                )  # fmt: skip
            held += count

        try:
            take(1)
            yield take
        finally:
            self.places.give_back(held)

    async def predict(
        self, sent: Sequence[Sent], pool: ThreadPoolExecutor, with_map: bool
    ) -> list[dict[str, Any]]:
        """Judge images in order; `Refusal` names the first that cannot be read."""
        ready = await _in(pool, [partial(self._read, each) for each in sent])
        jobs = [self.worker.submit(each.network_input) for each in ready]
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, jobs))
        finally:
            for job in jobs:  # those that wait, if this was given up
                job.cancel()
        results = await _in(
            pool,
            [partial(self._result, *pair, with_map) for pair in zip(ready, found, strict=True)],
        )
        for each, result in zip(found, results, strict=True):
            self._metrics.images.labels(self.name, result["verdict"]).inc()
            if self._drift is not None and each.nll is not None:  # always in this one thread
                self._drift.add(each.nll)
        return results

    def about(self) -> dict[str, Any]:
        """Return what users of the model need to know; no path of this machine."""
        bundle = self.bundle
        state = self.worker.state
        image, pixel = bundle.image_threshold, bundle.pixel_threshold
        return {
            "name": self.name,
            "state": state,
            "trained": {k: str(v) for k, v in (bundle.about.get("model") or {}).items()},
            "input_size": list(bundle.input_size),
            "image_threshold": {**image.to_dict(), "text": image.describe()},
            "pixel_threshold": {**pixel.to_dict(), "text": pixel.describe()},
            "color_scale": list(bundle.color_scale),
            "drift": "" if self._drift is None else self._drift.describe(),
            "drift_alarm": self._drift is not None and self._drift.alarm,
            "engine": self.worker.ready.result() if state == "ok" else "",
        }

    def _read(self, sent: Sent) -> _Ready:
        bundle = self.bundle
        try:
            pixels = decode_image(sent.data, sent.name, self._limits.pixels)
        except UserError as error:
            status = 413 if isinstance(error, TooManyPixels) else 422
            raise Refusal(status, str(error)) from None
        network_input = to_input(pixels, bundle.input_size, bundle.resize)
        return _Ready(sent.name, pixels.shape[:2], network_input)

    def _result(self, ready: _Ready, found: Found, with_map: bool) -> dict[str, Any]:
        height, width = ready.size
        judged = self._judge(found, ready.size)
        result = {"name": ready.name, "width": width, "height": height, **judged.result}
        if with_map:
            png = heat_png(judged.anomaly_map, self.bundle.color_scale)
            result["map"] = base64.b64encode(png).decode("ascii")
        return result

    def _count(self, batch: Batch) -> None:
        self._metrics.batch.labels(self.name).observe(batch.images)
        self._metrics.engine_seconds.labels(self.name).observe(batch.seconds)
        if batch.failed:
            self._metrics.faults.labels(self.name).inc()


def heat_png(anomaly_map: np.ndarray, scale: tuple[float, float]) -> bytes:
    """Colour a map (H, W) and return it as PNG, with at most `MAP_SIDE` pixels along a side."""
    height, width = anomaly_map.shape
    factor = min(1.0, MAP_SIDE / max(height, width))
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        anomaly_map = cv2.resize(anomaly_map, size, interpolation=cv2.INTER_AREA)
    colours = heat_map(anomaly_map, *scale)
    _, png = cv2.imencode(".png", np.ascontiguousarray(colours[..., ::-1]))
    return png.tobytes()


async def _in(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls in threads; the first failure cancels those that have not begun."""
    futures = [pool.submit(call) for call in calls]
    try:
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    finally:
        for future in futures:
            future.cancel()
