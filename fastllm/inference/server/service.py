"""What stands between HTTP and the engine: how many answers may wait, and what is measured."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..async_engine import AsyncEngine
from ..request import Delta
from .bodies import Generation, Model
from .errors import ApiError, shutting_down
from .metrics import Metrics


class Service:
    """Runs generations on an engine.

    Args:
        engine: answers.
        model: what the server calls it, and its limits.
        max_queue: answers that may wait beside those that the engine runs at once.
    """

    def __init__(self, engine: AsyncEngine, model: Model, max_queue: int) -> None:
        self.engine, self.model = engine, model
        self.metrics = Metrics(lambda: engine.stats)
        self.draining = False
        self._most = engine.engine.max_batch + max_queue
        self._answers = 0  # that run or wait

    @property
    def busy(self) -> bool:
        return self._answers > 0

    async def deltas(self, generation: Generation) -> AsyncGenerator[tuple[int, Delta], None]:
        """What the engine adds to the answers, with their numbers.

        Raises:
            ApiError: too many wait, or the server is shutting down.
            UserError, EngineClosed: see :meth:`AsyncEngine.stream`.
        """
        if self.draining:
            raise shutting_down()
        if generation.answers > self._most:
            raise ApiError(400, f"a request has at most {self._most} answers here, not {generation.answers}", param="n")
        if self._answers + generation.answers > self._most:
            message = f"the server is busy: {self._answers} answers run or wait, {self._most} may"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._answers += generation.answers
        start = time.monotonic()
        latest = [0.0] * generation.answers
        try:
            async with aclosing(self.engine.stream(generation.prompts, generation.params)) as deltas:
                async for i, delta in deltas:
                    self._measure(start, latest, i, delta)
                    yield i, delta
            self.metrics.whole.observe(time.monotonic() - start)
        finally:
            self._answers -= generation.answers

    def _measure(self, start: float, latest: list[float], i: int, delta: Delta) -> None:
        now, count = time.monotonic(), len(delta.tokens)
        if count and not latest[i]:
            self.metrics.first_token.observe(now - start)
            self.metrics.queue.observe(delta.queued)
        elif count:  # a step with speculation gives several
            for _ in range(count):
                self.metrics.between_tokens.observe((now - latest[i]) / count)
        if count:
            latest[i] = now
