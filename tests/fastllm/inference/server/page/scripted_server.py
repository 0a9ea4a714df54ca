"""A server that shows the chat page and answers as a test tells it to: what a model says must be under control."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastllm.inference.server.chat_page import page


def event(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def ending(tokens: int, finish_reason: str = "stop") -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}
    return (
        event(choices=[{"index": 0, "delta": {}, "finish_reason": finish_reason}])
        + event(choices=[], usage=usage)
        + b"data: [DONE]\n\n"
    )


async def pieces(text: str, pause: int = 0) -> AsyncIterator[bytes]:
    """An answer in pieces of a few characters, as tokens have them; it pauses after each ``pause`` of them."""
    tokens = re.findall(r"\s?\S{1,6}|\s", text)
    for i, token in enumerate(tokens):
        if pause and i % pause == 0:
            await asyncio.sleep(0.01)
        yield delta(token)
    yield ending(len(tokens))


def stream(chunks: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(chunks, media_type="text/event-stream")


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedServer:
    """`say` is the next answers' text, or a function from a request's body to a response."""

    def __init__(self) -> None:
        self.reset()
        html = page()
        routes = [
            Route("/", lambda request: html),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def reset(self) -> None:
        self.say: str | Callable[[dict[str, Any]], Response] = "Hello."
        self.key: str | None = None
        self.models_named = ["tiny-chat", "other-chat"]
        self.bodies: list[dict[str, Any]] = []
        self.closed_early = 0

    def until(self, met: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < end
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return refusal(401, "Incorrect API key provided.", "invalid_api_key")

    async def models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model"} for name in self.models_named]
        return self.refused(request) or JSONResponse({"object": "list", "data": models})

    async def chat(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.bodies.append(body)
        return self.say(body) if callable(self.say) else stream(self.watched(pieces(self.say)))

    async def watched(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same chunks; counts the clients that go away before the last one."""
        try:
            async for chunk in chunks:
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.closed_early += 1
            raise
