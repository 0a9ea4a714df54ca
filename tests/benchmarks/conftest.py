"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as command
from benchmarks import accuracy


@pytest.fixture(autouse=True)
def compiled_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, which other tests want, is too slow for all ops."""
    monkeypatch.setattr(accuracy.backends, "TRITON_INTERPRET", False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of a made-up machine, errors of one op if none is named, and no pages written beforehand."""
    measure = accuracy.measure
    monkeypatch.setattr(command.accuracy, "measure", lambda only: measure(only or ("swiglu",)))
    monkeypatch.setattr(command.peaks, "measure", lambda seconds: {"copy": 10.0, "bfloat16": 0.1, "float32": 0.1})
    monkeypatch.setattr(command, "_back_memory", lambda: None)
