"""What every request passes: an id, the token, one line in the log, counters, tidy errors."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.service import logs
from deploy.service.limits import Refusal
from deploy.service.service import Service

OPEN = ("/", "/docs", "/openapi.json", "/health")  # without a token, too
LONGEST_PATH = 200  # characters in the log
STOPS_EARLY = 499  # in the log: the client closed the connection before the answer


class Envelope:
    """An ASGI application around the service's own."""

    def __init__(self, app: ASGIApp, service: Service, paths: Sequence[str]) -> None:
        self._app, self._service, self._paths = app, service, frozenset(paths)
        self._token = service.token.encode() if service.token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; other messages of ASGI go through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        status = STOPS_EARLY
        log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(log=log, request_id=request_id)

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-ID"] = request_id
                answered["X-Content-Type-Options"] = "nosniff"
                answered["Referrer-Policy"] = "no-referrer"
                answered.setdefault("Cache-Control", "no-store")
                if self._service.stopping:
                    answered["Connection"] = "close"
            await send(message)

        try:
            if self._may(scope["path"], headers):
                await self._app(scope, receive, tell)
            else:
                refusal = Refusal(401, "the token is missing or wrong; send Authorization: Bearer")
                await _answer(Request(scope), refusal)(scope, receive, tell)
        except Exception:  # FastAPI has answered it with 500
            logs.LOGGER.exception("fault", extra={"fields": {"id": request_id}})
        finally:
            self._record(scope, request_id, status, time.perf_counter() - start, log)

    def _may(self, path: str, headers: Headers) -> bool:
        if self._token is None or path in OPEN:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        return scheme.lower() == "bearer" and same

    def _record(
        self, scope: Scope, request_id: str, status: int, seconds: float, log: dict[str, Any]
    ) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        metrics = self._service.metrics
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(seconds)
        logs.event(
            "request",
            level=_level(path, status),
            id=request_id,
            client=(scope.get("client") or ("",))[0],
            method=scope["method"],
            path=scope["path"][:LONGEST_PATH],
            status=status,
            ms=round(seconds * 1000, 1),
            **log,
        )


def add_error_answers(app: FastAPI) -> None:
    """Make every failure the same JSON: one line of text and the request's id."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return _answer(request, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _answer(request, Refusal(422, f"{place}: {first['msg']}"))

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = _answer(request, Refusal(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    async def gone(request: Request, _: Exception) -> JSONResponse:
        return _answer(request, Refusal(STOPS_EARLY, "the client closed the connection"))

    async def fault(request: Request, _: Exception) -> JSONResponse:
        return _answer(request, Refusal(500, "a fault of the service; its log has this id"))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, fault)


def _answer(request: Request, refusal: Refusal) -> JSONResponse:
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    request.state.log["error"] = refusal.message
    content = {"error": refusal.message, "request_id": request.state.request_id}
    return JSONResponse(content, refusal.status, headers)


def _level(path: str, status: int) -> int:
    if status >= 500 and status != HTTPStatus.SERVICE_UNAVAILABLE:
        return logging.ERROR
    asked_often = path in ("/health", "/metrics") and status == HTTPStatus.OK
    return logging.DEBUG if asked_often else logging.INFO


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given, re.A) else uuid.uuid4().hex
