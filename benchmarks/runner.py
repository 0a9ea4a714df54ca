"""Runs a case: its implementations take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .cases import Case
from .record import Row
from .timing import CLOCK, Clock, extra_memory

FEWEST, MOST = 5, 200  # rounds


def run(case: Case, seconds: float, clock: Clock = CLOCK, wrap: Callable = CLOCK.timed) -> list[Row]:
    """A row for each implementation. One that fails leaves its error in its row; the others are timed all the same.

    Each is called twice first, and once to see its memory. ``seconds`` limits the rounds, beyond FEWEST of them.
    """
    torch._dynamo.reset()  # so that each size is compiled as it is
    try:
        torch.manual_seed(0)
        calls = case.build()
    except Exception as error:
        return [_row(case, name, error=one_line(error)) for name in case.implementations]
    rows = {name: _row(case, name) for name in calls}
    timed = {name: wrap(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float | None]] = {name: [] for name in calls}

    def once(name: str) -> float:
        before = clock()
        timed[name]()
        return clock() - before

    @contextmanager
    def excused(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            rows[name].error = one_line(error)
            del times[name]

    round_seconds = 0.0
    for name, call in calls.items():
        with excused(name):
            timed[name]()
            round_seconds += once(name)
            rows[name].memory = extra_memory(call)
    rounds = min(MOST, max(FEWEST, round(seconds / max(round_seconds, 1e-6))))
    end = time.monotonic() + 3 * seconds  # setting up a call may take longer than the call
    for number in range(rounds):
        if number >= FEWEST and time.monotonic() > end:
            break
        for name in tuple(times):
            with excused(name):
                times[name].append(once(name))
                hosts[name].append(clock.host)
    for name, lasted in times.items():
        row = rows[name]
        row.low, row.seconds, row.high = statistics.quantiles(lasted, n=4, method="inclusive")
        row.rounds = len(lasted)
        known = [host for host in hosts[name] if host is not None]
        row.host = statistics.median(known) if len(known) == len(lasted) else None
    return list(rows.values())


def _row(case: Case, implementation: str, error: str = "") -> Row:
    return Row(
        op=case.op, size=case.size, direction=case.direction, dtype=case.dtype, implementation=implementation,
        work=case.work, unit=case.unit, error=error, sweep=case.sweep, at=case.at,
    )  # fmt: skip


def one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
