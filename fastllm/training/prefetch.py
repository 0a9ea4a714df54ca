"""Work for coming steps, done by a thread while the current step runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Self, TypeVar, cast

T = TypeVar("T")

AHEAD = 2  # steps whose results are kept ready


class Prefetcher(Generic[T]):
    """``make(index)``, ``make(index + step)``, … computed ahead inside of a ``with`` block; outside of one, when asked.

    The results are the same either way. An error of ``make`` is raised where its result is asked for.
    """

    def __init__(self, make: Callable[[int], T], step: int) -> None:
        self._make, self._step = make, step
        self._active = False
        self._thread: _Thread[T] | None = None

    def __enter__(self) -> Self:
        self._active = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._active = False
        self._stop()

    def get(self, index: int) -> T:
        """``make(index)``. Asking for another index than the next one starts anew from there."""
        if not self._active:
            return self._make(index)
        if self._thread is None or self._thread.next != index:
            self._stop()
            self._thread = _Thread(self._make, index, self._step)
        return self._thread.get()

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None


class _Thread(Generic[T]):
    """A thread that calls ``make`` for one index after the other until it is stopped or an error ends it."""

    def __init__(self, make: Callable[[int], T], index: int, step: int) -> None:
        self.next, self._step = index, step
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, index), name="fastllm-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> T:
        result, error = self._ready.get()
        if error is not None:
            self.next = -1  # nothing more comes
            raise error
        self.next += self._step
        return cast(T, result)  # of a call that raised nothing

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # it may be waiting for room

    def _run(self, make: Callable[[int], T], index: int) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put((make(index), None))
            except BaseException as error:
                self._ready.put((None, error))
                return
            index += self._step
