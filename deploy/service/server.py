"""Uvicorn with what it lacks: a drained stop, a time limit for heads of requests, tidy refusals."""

import asyncio
import json
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.service import logs
from deploy.service.service import Service
from utils.errors import UserError

HEAD_SECONDS = 10.0  # for the head of a request to arrive
LINGER_SECONDS = 2.0  # for a client to finish sending and read why it is refused
KEPT_SECONDS = 15  # that an idle connection stays open


class Server(uvicorn.Server):
    """A server that goes on for `drain` seconds after a signal, then finishes what it accepted.

    A second signal ends the wait.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain
        service.on_failure = self._give_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and log the address."""
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            logs.event("listening", host=host, port=port, models=list(self._service.models))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; called by a signal."""
        if self._service.stopping:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._service.stopping = True
        logs.event("stopping", signal=signal.Signals(sig).name)
        if self._drain and self.started:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._drain, self._give_up)
        else:
            self._give_up()

    def _give_up(self) -> None:
        self.should_exit = True


class Protocol(H11Protocol):
    """HTTP/1.1 that closes connections whose requests do not begin to make sense in time."""

    _watch: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come, except from a client that was refused."""
        if self._refused:
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        if self._watch:
            self._watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and leave the client time to read that.

        Closing at once would reset the connection while it still sends.
        """
        self._refused = True
        body = json.dumps({"error": f"{msg} Its head is damaged or too long."}).encode()
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _watch_head(self) -> None:
        inside = self.cycle is not None and not self.cycle.response_complete
        if inside and self._watch:
            self._watch.cancel()
            self._watch = None
        elif not inside and not self._watch:
            self._watch = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def bound(host: str, port: int) -> socket.socket:
    """Take an address; `UserError` if it cannot be had."""
    if not 0 <= port <= 65535:  # the resolver would wrap it around
        raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # with the protocol named, asyncio switches Nagle's delay of 40 ms off
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({error.strerror}); choose others"
        ) from None
    return taken


def server(app: ASGIApp, service: Service, drain: float) -> Server:
    """Return a server for the application; its `run` is handed a bound socket."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=int(service.limits.seconds) + 5,
    )
    return Server(config, service, drain)
