"""The service's addresses: /predict, /health, /models, /metrics, the page and the documentation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp

from deploy.service.body import images_of
from deploy.service.envelope import Envelope, add_error_answers
from deploy.service.limits import Refusal
from deploy.service.metrics import CONTENT_TYPE
from deploy.service.pages import Page
from deploy.service.schemas import (
    RESULT,
    Health,
    Models,
    Options,
    Prediction,
    failures,
    good,
    predict_extra,
)
from deploy.service.service import Service

T = TypeVar("T")
PATHS = ("/", "/docs", "/openapi.json", "/health", "/predict", "/models", "/metrics")


def build(service: Service) -> ASGIApp:
    """Return the application."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        yield
        service.stopping = True
        starting.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="FlowAD", version="1", description="Find defects in images.", lifespan=life,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    add_error_answers(app)
    _add_predict(app, service)
    _add_views(app, service)
    return Envelope(app, service, PATHS)


def _guards(service: Service) -> list[Any]:
    """Show in the documentation that a token is needed; the envelope checks it."""
    return [Depends(HTTPBearer(auto_error=False))] if service.token else []


def _refused(service: Service, **reasons: str) -> dict[int | str, dict[str, Any]]:
    token = {"e401": "The token is missing or wrong"} if service.token else {}
    return failures(**token, **reasons)


def _add_predict(app: FastAPI, service: Service) -> None:
    limits = service.limits

    @app.post(
        "/predict",
        summary="Judge images",
        response_model=Prediction,
        response_model_exclude_none=True,
        dependencies=_guards(service),
        openapi_extra=predict_extra(token=bool(service.token)),
        responses=good("A result per image", {"model": "bottle", "results": [RESULT]})
        | _refused(
            service,
            e400="The body is damaged",
            e404="No such model",
            e408=f"The body did not arrive within {limits.seconds:g} s",
            e413=f"More than {limits.body_bytes:,} bytes, {limits.images} images or "
            f"{limits.pixels / 1e6:g} million pixels",
            e415="Neither multipart/form-data nor application/json",
            e422="A file is no image that can be read, or the request is not as described",
            e500="A fault of the service or its engine; the log has more",
            e503="All places are taken (see Retry-After), or the model is not ready",
            e504=f"No result within {limits.seconds:g} s",
        ),
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Any:
        """Send image files as form fields `images`, or as JSON `{"images": [base64, …]}`.

        All images are judged or none: one that cannot be read fails the request.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.seconds
        model = service.model(options.model)
        request.state.log["model"] = model.name
        with model.accepted() as take:
            body = await _within(
                deadline, _read(request, limits.body_bytes), 408, "the body did not arrive in time"
            )
            kind = request.headers.get("content-type", "")
            late = f"no result within {limits.seconds:g} s"
            work = loop.run_in_executor(service.pool, images_of, body, kind, limits.images)
            sent = await _within(deadline, work, 504, late)
            del body
            request.state.log["images"] = len(sent)
            take(len(sent) - 1)
            results = await _within(
                deadline, model.predict(sent, service.pool, options.map), 504, late
            )
        request.state.log["anomalies"] = sum(r["verdict"] == "Anomaly" for r in results)
        return {"model": model.name, "results": results}


def _add_views(app: FastAPI, service: Service) -> None:
    page, documentation = Page("index.html"), Page("api.html")

    @app.get("/health", summary="Whether the service can be used", responses={
        200: {"model": Health, "description": "It can"},
        503: {"model": Health, "description": "Not now"}})  # fmt: skip
    async def health() -> Response:
        """Answer 200 if `status` is `ok`; else 503 with starting, failed or stopping."""
        about = service.about()
        return JSONResponse(about, 200 if about["status"] == "ok" else 503)

    @app.get(
        "/models",
        summary="What is served",
        response_model=Models,
        dependencies=_guards(service),
        responses=good("All models") | _refused(service),
    )
    async def models() -> Any:
        """List the models with their thresholds, the first being the first that was named."""
        return {"models": [model.about() for model in service.models.values()]}

    @app.get("/metrics", summary="Counters in Prometheus' form", dependencies=_guards(service),
             response_class=Response, responses={
                 200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}},
                       "description": "Text"}, **_refused(service)})  # fmt: skip
    async def metrics() -> Response:
        """Count requests, images, batches, seconds."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page.response()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return documentation.response()


async def _within(deadline: float, work: Awaitable[T], status: int, message: str) -> T:
    """Await what must be done at `deadline` of the loop's clock; `Refusal` if it is not."""
    left = max(0.0, deadline - asyncio.get_running_loop().time())
    try:
        return await asyncio.wait_for(work, left)
    except asyncio.TimeoutError:
        raise Refusal(status, message) from None


async def _read(request: Request, most: int) -> bytes:
    """Read a body of at most `most` bytes; `Refusal` as soon as it is known to be longer."""
    too_long = Refusal(413, f"more than {most:,} bytes; send fewer or smaller images")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > most:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        if len(body) + len(piece) > most:
            raise too_long
        body += piece
    return bytes(body)
