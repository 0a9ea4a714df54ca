"""The application: what is behind each address."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from .answers import Answers
from .bodies import Generation, Model, chat_generation, completion_generation
from .chat_page import page
from .errors import ApiError, as_api_error
from .fields import parse_body
from .gate import Access, ClientGone, Gate, Record
from .metrics import CONTENT_TYPE
from .service import Service

T = TypeVar("T")
BODY_SECONDS = 60  # in which a body must be here
FAREWELL_SECONDS = 1  # for the last event of a stream that ends with an error


def make_app(
    service: Service,
    access: Access,
    *,
    max_body: int,
    timeout: float,
    log: Callable[[Record], None] = lambda record: None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        service: what answers.
        access: who may ask.
        max_body: bytes of a request's body.
        timeout: seconds that an answer may take, those in the queue included.
        log: is told of each request when it has ended.
    """
    model, created, html = service.model, int(time.time()), page()
    description = {
        "id": model.name, "object": "model", "created": created, "owned_by": "fastllm",
        "max_model_len": model.max_seq_len,
    }  # fmt: skip

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [description]})

    async def one_model(request: Request) -> Response:
        model.check_name(request.path_params["name"])
        return JSONResponse(description)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "draining"}, 503) if service.draining else JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def root(request: Request) -> Response:
        if request.headers.get("if-none-match") == html.headers["etag"]:
            return Response(status_code=304, headers={k: v for k, v in html.headers.items() if k != "content-length"})
        return html

    answer = {
        "/v1/chat/completions": _Endpoint(service, chat_generation, max_body, timeout),
        "/v1/completions": _Endpoint(service, completion_generation, max_body, timeout),
    }
    get = {"/": root, "/health": health, "/metrics": metrics, "/v1/models": models}
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in answer.items()),
        *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
    ]
    router = Router(routes, redirect_slashes=False)
    return Gate(router, access, service.metrics, frozenset((*answer, *get)), log)


class _Endpoint:
    """An address that generates."""

    def __init__(
        self,
        service: Service,
        read: Callable[[dict[str, Any], Model], Generation],
        max_body: int,
        timeout: float,
    ) -> None:
        self._service, self._read, self._max_body, self._timeout = service, read, max_body, timeout
        self._threads = ThreadPoolExecutor(2, "fastllm bodies")  # long prompts take a while to encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model, record = self._service.model, scope["fastllm.record"]
        content = await _body(Request(scope, receive), self._max_body)
        loop = asyncio.get_running_loop()
        generation = await loop.run_in_executor(self._threads, lambda: self._read(parse_body(content), model))
        answers = Answers(generation, model.name, model.tokenizer)
        try:
            if generation.stream:
                await self._stream(generation, answers, receive, send)
            else:
                await attended(receive, self._collect(generation, answers), self._timeout)
                await JSONResponse(answers.whole())(scope, receive, send)
        finally:
            record.tokens = {
                "prompt": answers.prompt_tokens, "cached": answers.cached_tokens, "generated": answers.generated_tokens,
            }  # fmt: skip

    async def _collect(self, generation: Generation, answers: Answers) -> None:
        async with aclosing(self._service.deltas(generation)) as deltas:
            async for i, delta in deltas:
                answers.add(i, delta)

    async def _stream(self, generation: Generation, answers: Answers, receive: Receive, send: Send) -> None:
        events = _EventStream(send)

        async def work() -> None:
            async with aclosing(self._service.deltas(generation)) as deltas:
                async for i, delta in deltas:
                    choice = answers.add(i, delta)
                    if choice is not None:
                        await events.send(json.dumps(answers.chunk(choice)))
            if generation.include_usage:
                await events.send(json.dumps(answers.last_chunk()))
            await events.send("[DONE]", last=True)

        try:
            await attended(receive, work(), self._timeout)
        except Exception as error:
            if not events.begun:
                raise
            told = as_api_error(error)
            with suppress(TimeoutError):  # of a client that doesn't read
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await events.send(json.dumps(told.body), last=True)


class _EventStream:
    """Server-sent events. The status is sent with the first of them: until then an error is an ordinary answer."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False

    async def send(self, data: str, *, last: bool = False) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        body = f"data: {data}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})


async def attended(receive: Receive, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of ``work``, which ends where the client goes away (ClientGone) or the time is over (ApiError)."""
    task, leaving = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientGone
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds", code="timeout")
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> bytes:
    """The body, of at most ``limit`` bytes."""
    too_large = ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or len(length) > 18 or int(length) > limit:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > limit:
                    raise too_large
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise ApiError(408, f"the body was not here within {BODY_SECONDS} seconds", code="timeout") from None
    return bytes(content)
