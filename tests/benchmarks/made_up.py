"""Cases, clocks and results that the benchmarks' tests make up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import COPY, PYTORCH, Case
from benchmarks.record import Row
from benchmarks.runner import run

BEFORE = {COPY: 1.0, PYTORCH: 8.0, "fastllm cpu": 2.0}


class FakeClock:
    """Seconds pass only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.host: float | None = None

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def tick(self) -> None:
        self.wait(0.02)


class FakeGpu:
    """A host and a GPU that works off what the host has enqueued, each with a time of its own; cycles of 1 ns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0  # the host's now; when the GPU will have done all it has
        cuda = {"Event": self._event, "_sleep": lambda cycles: self.launch(0.0, cycles * 1e-9)}
        for name, value in (cuda | {"synchronize": self.synchronize}).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
        monkeypatch.setattr(timing.Clock, "overwrite_cache", lambda clock: self.launch(1e-5, 1e-5))

    def launch(self, dispatch: float, kernel: float) -> None:
        self.host += dispatch
        self.free = max(self.free, self.host) + kernel

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def _event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.free, self.host))
        event.query = lambda: event.at <= self.host
        event.elapsed_time = lambda later: (later.at - event.at) * 1e3
        return event


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
