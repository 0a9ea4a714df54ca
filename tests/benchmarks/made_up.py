"""Cases, clocks and results that the benchmarks' tests make up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.cases import COPY, PYTORCH, Case
from benchmarks.record import Row
from benchmarks.runner import run

BEFORE = {COPY: 1.0, PYTORCH: 8.0, "fastllm cpu": 2.0}


class FakeClock:
    """Seconds pass only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def tick(self) -> None:
        self.wait(0.02)


def case_of(calls: dict[str, Callable[[], Any]], **more: Any) -> Case:
    return Case("rms_norm", "2×3", "forward+backward", "float32", 1e9, "GB/s", tuple(calls), lambda: calls, **more)


def timed(calls: Callable[[FakeClock], dict[str, Callable[[], Any]]], seconds: float = 1.0) -> list[Row]:
    clock = FakeClock()
    return run(case_of(calls(clock)), seconds, clock, wrap=lambda call: call)


def rows(seconds: dict[str, float], noise: float = 0.02, rounds: int = 25) -> list[Row]:
    base = Row("rms_norm", "2×3", "forward+backward", "float32", "", 1e9, "GB/s", rounds=rounds)
    return [
        replace(base, implementation=name, seconds=s, low=s * (1 - noise), high=s * (1 + noise))
        for name, s in seconds.items()
    ]
