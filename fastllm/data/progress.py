"""Progress of work that takes long: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from rich import progress as bars

from .. import console

T = TypeVar("T")

QUIET = 10.0  # seconds before the first line, where there is no terminal; each further line takes twice as long


class Progress:
    """How much of ``total`` is done."""

    def __init__(self, what: str, total: int, bar: bars.Progress | None) -> None:
        self._what, self._total, self._bar = what, total, bar
        self._task = bar.add_task(what, total=total) if bar else None
        self._done, self._began, self._next = 0, time.monotonic(), QUIET

    def advance(self, n: int = 0) -> None:
        """``n`` more are done; 0 only shows that work continues."""
        self._done += n
        if self._bar and self._task is not None:
            self._bar.advance(self._task, n)
        elif (seconds := time.monotonic() - self._began) >= self._next:
            self._next *= 2
            share = f"{100 * self._done // self._total} % " if self._total else ""
            left = seconds * (self._total / self._done - 1) if self._total and self._done else 0.0
            more = f", about {left:.0f} s left" if left >= 0.5 else ""
            console.say("", f"{self._what}: {share}after {seconds:.0f} s{more}")

    def enter(self, what: str) -> None:
        """A further part of the work, of unknown length."""
        self._what, self._total = what, 0
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=what, total=None)


@contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Show how much of ``total`` is done while the block runs."""
    terminal = console.console
    if not terminal.is_terminal or terminal.quiet:
        yield Progress(what, total, None)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=terminal, transient=True) as bar:
        yield Progress(what, total, bar)


def interruptible(
    work: Callable[[], T], tick: Callable[[], None], interrupted: threading.Event, native: threading.Event
) -> T:
    """``work()`` in a thread, so that Ctrl-C takes effect at once where ``work`` is inside of native code.

    Args:
        work: should raise soon after ``interrupted`` is set.
        tick: called once a second meanwhile.
        interrupted: set by this function.
        native: set by ``work`` when it stays in native code, where nothing ends it. Then an interrupted thread is left
            alone, to end with the process at the latest; else it is waited for, because a thread that comes back to
            Python while the process ends would abort it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="fastllm-tokenizer", daemon=True)
    thread.start()
    try:
        while not future.done():
            wait([future], timeout=1.0)
            tick()
    except BaseException:
        interrupted.set()
        while thread.is_alive() and not native.is_set():
            thread.join(0.05)
        raise
    return future.result()
