"""The engine in a thread of its own, for servers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..errors import UserError
from .engine import Engine
from .request import NOT_FINITE, Delta, Prompt, Request
from .sampling import SamplingParams

T = TypeVar("T")


class EngineClosed(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class _Client:
    """Who waits for a request: the deltas go to its event loop."""

    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue[Delta | BaseException] = field(default_factory=asyncio.Queue)

    def send(self, delta: Delta | BaseException) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, delta)


class AsyncEngine:
    """Runs an :class:`Engine` in a thread. Its methods may be called from any event loop.

    ``stats`` is a snapshot of the engine's counts, renewed at each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.stats = engine, engine.stats
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: dict[Request, _Client] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastllm engine", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Delta]:
        """Continue a prompt; yields what each step adds, the last with a finish_reason.

        The request ends, and its pages are free, as soon as the iterator is closed or its task is cancelled.

        Raises:
            UserError: the prompt or a parameter is wrong, or the logits are not finite.
            EngineClosed: the engine ends.
        """
        if self._closed:
            raise EngineClosed("the engine is shutting down")
        client = _Client(asyncio.get_running_loop())
        adding = self._call(lambda: self._add(prompt, params, client))
        try:
            await asyncio.wrap_future(adding)
            while True:
                delta = await client.deltas.get()
                if isinstance(delta, BaseException):
                    raise delta
                if delta.finish_reason == "error":
                    raise UserError(NOT_FINITE)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._call(lambda: self._cancel(client))

    async def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, wait up to so many seconds for those that run, and end the thread."""
        self._closed = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._clients and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self._calls.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    # ---- in the thread ----

    def _call(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in the thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # for whoever waits
                future.set_exception(error)

        self._calls.put(run)
        return future

    def _add(self, prompt: Prompt, params: SamplingParams, client: _Client) -> None:
        (request,) = self.engine.add(prompt, replace(params, n=1))
        self._clients[request] = client

    def _cancel(self, client: _Client) -> None:
        for request in [request for request, waiting in self._clients.items() if waiting is client]:
            self.engine.cancel(request)
            del self._clients[request]

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(block=not self.engine.busy)
            except queue.Empty:
                self._step()
                continue
            if call is None:
                break
            call()
            self.stats = self.engine.stats
        self._end_all(EngineClosed("the engine was shut down"))

    def _end_all(self, error: Exception) -> None:
        for request, client in self._clients.items():
            self.engine.cancel(request)
            client.send(error)
        self._clients.clear()

    def _step(self) -> None:
        try:
            grown = self.engine.step()
        except Exception as error:  # out of memory, a bug: all requests end, the engine lives on
            self._end_all(error)
            return
        for request in grown:
            client = self._clients.get(request)
            if client is None:
                continue
            delta = request.take()
            if delta.finish_reason is not None:
                del self._clients[request]
            client.send(delta)
        self.stats = self.engine.stats
