"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import accuracy


@pytest.fixture(autouse=True)
def compiled_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, which other tests want, is too slow for all ops."""
    monkeypatch.setattr(accuracy.backends, "TRITON_INTERPRET", False)


@pytest.fixture
def outside_the_interpreter() -> Callable[[str], Any]:
    """What ``call`` of a module of benchmarks/ returns ("module.call") in a process where Triton compiles."""

    def run(place: str) -> Any:
        module, call = place.split(".")
        code = f"import json; from benchmarks.{module} import {call}; print(json.dumps({call}()))"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of a made-up machine, errors of one op if none is named, and no pages written beforehand."""
    measure = accuracy.measure
    monkeypatch.setattr(command.accuracy, "measure", lambda only: measure(only or ("swiglu",)))
    monkeypatch.setattr(command.peaks, "measure", lambda seconds: {"copy": 10.0, "bfloat16": 0.1, "float32": 0.1})
    monkeypatch.setattr(command, "_back_memory", lambda: None)
