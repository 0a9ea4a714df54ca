"""What every request passes: who may ask, from which page, and what every answer carries."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, as_api_error
from .metrics import Metrics

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
CLIENT_GONE = 499  # nginx's word, for the log and the metrics: nobody reads the answer
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class ClientGone(Exception):
    """Nobody waits for the answer."""


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        key: that /v1 and /metrics ask for; None: none.
        hosts: names by which the server may be called, against DNS rebinding; None: any.
        origins: of web pages elsewhere that may ask; "*": all.
    """

    key: bytes | None = None
    hosts: frozenset[str] | None = LOOPBACK_NAMES
    origins: frozenset[str] = frozenset()

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError where the request may not pass."""
        host = headers.get("host", "").lower()
        if self.hosts is not None and _name(host) not in self.hosts and not _name(host).endswith(".localhost"):
            raise ApiError(403, "the server is not called by this name: see --allow-host", code="unknown_host")
        origin = headers.get("origin")
        if (
            origin is not None
            and not self.allows(origin)
            and origin.lower() not in (f"http://{host}", f"https://{host}")
        ):
            raise ApiError(403, "pages of this origin may not ask: see --allow-origin", code="unknown_origin")
        path, preflight = scope["path"], scope["method"] == "OPTIONS"  # browsers send it without the key
        if self.key is not None and not preflight and (path == "/metrics" or path == "/v1" or path.startswith("/v1/")):
            self._check_key(headers)
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != (
            "application/json"  # a form of a page elsewhere can't have it
        ):
            raise ApiError(415, "the Content-Type must be application/json", code="unsupported_media_type")

    def _check_key(self, headers: Headers) -> None:
        assert self.key is not None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.key)
        if scheme.lower() != "bearer" or not right:
            message = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def allows(self, origin: str | None) -> bool:
        """Whether pages of an origin elsewhere may ask."""
        return origin is not None and ("*" in self.origins or origin in self.origins)


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


@dataclass
class Record:
    """A request, for the log; the endpoint fills in what it knows."""

    client: str
    method: str
    path: str
    status: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Gate:
    """The outermost layer of the application."""

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, paths: frozenset[str], log: Callable[[Record], None]
    ) -> None:
        self._app, self._access, self._metrics, self._paths, self._log = app, access, metrics, paths, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers, start = Headers(scope=scope), time.monotonic()
        client = (scope.get("client") or ("-",))[0]
        scope["app"] = self  # then the router raises HTTPException
        record = scope["fastllm.record"] = Record(client, scope["method"], scope["path"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self._add_headers(message, headers)
            await send(message)

        try:
            try:
                self._access.check(scope, headers)
                if scope["method"] == "OPTIONS" and self._access.allows(headers.get("origin")):
                    await self._preflight(headers)(scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
            except ClientGone:
                record.status = CLIENT_GONE
                await Response(status_code=CLIENT_GONE)(scope, receive, send)  # for uvicorn's account
            except Exception as error:
                if record.status:  # a part of the answer is out
                    raise
                told = as_api_error(error)
                await JSONResponse(told.body, told.status, told.headers)(scope, receive, send_with_headers)
        finally:
            record.seconds = time.monotonic() - start
            path = record.path if record.path in self._paths else "other"
            self._metrics.requests.labels(path, str(record.status)).inc()
            self._log(record)

    def _add_headers(self, message: MutableMapping[str, Any], request: Headers) -> None:
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        origin = request.get("origin")
        if self._access.allows(origin):
            headers["Access-Control-Allow-Origin"] = origin or ""
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        else:
            headers["Cross-Origin-Resource-Policy"] = "same-origin"
        if self._access.origins:
            headers.add_vary_header("Origin")

    @staticmethod
    def _preflight(request: Headers) -> Response:
        headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        asked = request.get("access-control-request-headers")
        if asked is not None:
            headers["Access-Control-Allow-Headers"] = asked
        return Response(status_code=204, headers=headers)
