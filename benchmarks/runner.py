"""Runs a case: its implementations take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .cases import Case
from .record import Row
from .timing import CLOCK, extra_memory

FEWEST, MOST = 5, 200  # rounds


def run(case: Case, seconds: float, clock: Callable[[], float] = CLOCK, wrap: Callable = CLOCK.timed) -> list[Row]:
    """A row for each implementation. One that fails leaves its error in its row; the others are timed all the same.

    Each is called twice first, and once to see its memory. ``seconds`` limits the rounds, beyond FEWEST of them.
    """
    torch._dynamo.reset()  # so that each size is compiled as it is
    torch.manual_seed(0)
    try:
        calls = case.build()
    except Exception as error:
        return [_row(case, name, error=_line(error)) for name in case.implementations]
    rows, ready, round_seconds = [], {}, 0.0
    for name, call in calls.items():
        timed = wrap(call)
        try:
            timed()
            before = clock()
            timed()
            round_seconds += clock() - before
            rows.append(_row(case, name, memory=extra_memory(call)))
            ready[name] = timed
        except Exception as error:
            rows.append(_row(case, name, error=_line(error)))
    times: dict[str, list[float]] = {name: [] for name in ready}
    rounds = min(MOST, max(FEWEST, round(seconds / max(round_seconds, 1e-6))))
    end = time.monotonic() + 3 * seconds  # setting up a call may take longer than the call
    for number in range(rounds):
        if number >= FEWEST and time.monotonic() > end:
            break
        for name, timed in ready.items():
            before = clock()
            timed()
            times[name].append(clock() - before)
    for row in rows:
        if row.implementation in times:
            low, middle, high = statistics.quantiles(times[row.implementation], n=4, method="inclusive")
            row.seconds, row.low, row.high, row.rounds = middle, low, high, len(times[row.implementation])
    return rows


def _row(case: Case, implementation: str, memory: int | None = None, error: str = "") -> Row:
    return Row(
        op=case.op, size=case.size, direction=case.direction, dtype=case.dtype, implementation=implementation,
        work=case.work, unit=case.unit, memory=memory, error=error, sweep=case.sweep, at=case.at,
    )  # fmt: skip


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
