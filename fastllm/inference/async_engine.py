"""The engine in a thread of its own, for servers."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import UserError
from ..kernels.native import release_threads
from .engine import Engine
from .request import NOT_FINITE, Delta, Prompt, Request
from .sampling import SamplingParams

T = TypeVar("T")


class EngineClosed(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class _Client:
    """Who waits for requests: the deltas go to its event loop."""

    loop: asyncio.AbstractEventLoop
    deltas: asyncio.Queue[tuple[int, Delta] | BaseException] = field(default_factory=asyncio.Queue)

    def send(self, delta: tuple[int, Delta] | BaseException) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, delta)


class AsyncEngine:
    """Runs an :class:`Engine` in a thread. Its methods may be called from any event loop.

    ``stats`` is a snapshot of the engine's counts, renewed at each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.stats = engine, engine.stats
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: dict[Request, tuple[int, _Client]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastllm engine", daemon=True)
        release_threads()  # of this one, which has loaded the model
        self._thread.start()

    async def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Continue each prompt ``params.n`` times; yields what the steps add, with the number of the answer.

        The answers of a prompt follow one another; the last delta of each has a finish_reason. All requests end, and
        their pages are free, as soon as the iterator is closed or its task is cancelled.

        Raises:
            UserError: a prompt or a parameter is wrong, or the logits are not finite.
            EngineClosed: the engine ends.
        """
        if self._closed:
            raise EngineClosed("the engine is shutting down")
        client = _Client(asyncio.get_running_loop())
        adding = self._call(lambda: self._add(prompts, params, client))
        left = len(prompts) * params.n
        try:
            await asyncio.wrap_future(adding)
            while left:
                item = await client.deltas.get()
                if isinstance(item, BaseException):
                    raise item
                reason = item[1].finish_reason
                if reason == "error":
                    raise UserError(NOT_FINITE)
                left -= reason is not None
                yield item
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

    def _add(self, prompts: Sequence[Prompt], params: SamplingParams, client: _Client) -> None:
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests += self.engine.add(prompt, params)
        except BaseException:
            for request in requests:
                self.engine.cancel(request)
            raise
        self._clients.update((request, (i, client)) for i, request in enumerate(requests))

    def _cancel(self, client: _Client) -> None:
        for request in [request for request, (_, waiting) in self._clients.items() if waiting is client]:
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
        for request, (_, client) in self._clients.items():
            self.engine.cancel(request)
            client.send(error)
        self._clients.clear()
        self.stats = self.engine.stats

    def _step(self) -> None:
        try:
            grown = self.engine.step()
        except Exception as error:  # out of memory, a bug: all requests end, the engine lives on
            self._end_all(error)
            return
        self.stats = self.engine.stats
        for request in grown:
            if request not in self._clients:
                continue
            i, client = self._clients[request]
            delta = request.take()
            if delta.finish_reason is not None:
                del self._clients[request]
            client.send((i, delta))
