"""The server's process: its socket, its connections, its signals."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import UserError
from .errors import ApiError
from .service import Service

HEADER_SECONDS = 15  # in which the head of a request must be here
STALL_SECONDS = 60  # that a client may take none of what is sent to it
IDLE_SECONDS = 60  # between two requests on a connection
END_SECONDS = 5  # for the last events of streams that the end of the drain cuts off


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which doesn't listen yet. UserError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"there is no host {host!r} to serve at") from None
    try:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"port {port} of {host}"
        reasons = {
            errno.EADDRINUSE: f"{where} is in use: choose another with --port",
            errno.EACCES: f"no permission to serve at {where}: choose a port from 1024 with --port",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        }
        raise UserError(reasons.get(error.errno or 0, f"can't serve at {where}: {error.strerror}")) from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Protocol(H11Protocol):
    """A connection that ends where its client is too slow, or where there are too many."""

    most = 0  # connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it so
        super().connection_made(transport)
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _too_many
        self._head = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = _cancel(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self._stall or self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _cancel(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stall = _cancel(self._head), _cancel(self._stall)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "this is no valid HTTP request").body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; returns what stands in its place."""
    if timer is not None:
        timer.cancel()
    return None


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": "1", "Connection": "close"}
    error = ApiError(503, "the server has too many connections", code="too_many_connections")
    await JSONResponse(error.body, error.status, headers)(scope, receive, send)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # serve() does


async def serve(
    app: ASGIApp,
    service: Service,
    listener: socket.socket,
    *,
    max_connections: int,
    drain: float,
    ready: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    The first signal stops new requests; those that run have ``drain`` seconds to end. The second ends the process at
    once.

    Args:
        app: answers requests.
        service: what ``app`` runs on.
        listener: of :func:`bind`.
        max_connections: beyond which connections get no answer but that.
        drain: seconds.
        ready: called when requests are answered.
        say: is told what happens.
    """
    protocol = type("Protocol", (_Protocol,), {"most": max_connections})
    config = uvicorn.Config(
        app, http=protocol, ws="none", interface="asgi3", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not of invalid requests
    server, loop = _Server(config), asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        service.draining = True
        say(f"ending: waiting up to {drain:g} seconds for the answers that run" if service.busy else "ending")
        await service.engine.close(drain)
        server.should_exit = True

    def on_signal(number: signal.Signals) -> None:
        if ending:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        ending.append(loop.create_task(end()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    started = loop.create_task(_when_started(server, ready))
    await server.serve([listener])
    await asyncio.gather(started, *ending)


async def _when_started(server: _Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    ready()
