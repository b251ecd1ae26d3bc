"""The service as a whole: its models, limits and life from start to stop."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deploy.service import logs
from deploy.service.limits import Limits, Refusal
from deploy.service.metrics import Metrics
from deploy.service.models import Model


class Service:
    """Hold what requests share. `on_failure` is called once if a model cannot be started."""

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        models: Mapping[str, Model],
        *,
        threads: int = 2,
        token: str | None = None,
    ) -> None:
        self.limits, self.metrics, self.models, self.token = limits, metrics, models, token
        self.stopping = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="image")

    @property
    def state(self) -> str:
        """Return starting, ok, stopping, or what the worst model is."""
        states = {model.worker.state for model in self.models.values()}
        if self.stopping:
            return "stopping"
        return next((s for s in ("failed", "starting") if s in states), "ok")

    def model(self, name: str | None) -> Model:
        """Return the model of that name, or the only one; `Refusal` if there is none or no choice.

        It is one if the model is not ready yet.
        """
        known = ", ".join(self.models)
        if name is None and len(self.models) > 1:
            raise Refusal(422, f"there are several models; add ?model= with one of {known}")
        found = next(iter(self.models.values())) if name is None else self.models.get(name)
        if found is None:
            raise Refusal(404, f"no model of this name; there is {known}")
        if found.worker.state != "ok":
            raise Refusal(
                503, f"{found.name}: {found.worker.state}; try again later", retry_after=5
            )
        return found

    async def start(self) -> None:
        """Start all engines, one after the other; remember the first failure."""
        for model in self.models.values():
            model.worker.start()
            try:
                note = await asyncio.wrap_future(model.worker.ready)
            except Exception as error:
                self.failure = error
                self.on_failure()
                return
            logs.event("model ready", model=model.name, engine=note or None)
        logs.event("ready")

    def close(self) -> None:
        """Finish what was accepted and end all threads."""
        for model in self.models.values():
            model.worker.close()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def about(self) -> dict[str, Any]:
        """Return the states of the service and its models."""
        return {
            "status": self.state,
            "models": {name: model.worker.state for name, model in self.models.items()},
        }

    def warn_if_open(self, host: str) -> None:
        """Log a warning if other machines may reach the service without a token."""
        if self.token is None and host not in ("127.0.0.1", "::1", "localhost"):
            logs.event(
                "no token: whoever reaches this address may use the service", host=host,
                level=logging.WARNING,
            )  # fmt: skip
