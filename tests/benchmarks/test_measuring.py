"""Timing in turns, on a CPU and on a GPU, and pytest-benchmark on the same cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import OURS, Case, Scale
from benchmarks.runner import FEWEST, run
from benchmarks.suite import every_case
from tests.benchmarks.made_up import FakeClock, FakeGpu, case_of, timed
from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[2]


def test_implementations_take_turns():
    order: list[str] = []

    def calls(clock: FakeClock) -> dict[str, Callable[[], Any]]:
        def call(name: str, seconds: float) -> None:
            order.append(name)
            clock.wait(seconds)

        return {"a": lambda: call("a", 0.01), "b": lambda: call("b", 0.04)}

    first, second = timed(calls)
    assert (first.seconds, second.seconds) == (pytest.approx(0.01), pytest.approx(0.04))
    assert first.rounds == second.rounds == 20  # one second of 0.05
    assert order[-40:] == ["a", "b"] * 20


def test_median_and_quartiles():
    lasts = iter([1.0, 1.0, 1.0, *[5.0, 1.0, 2.0, 4.0, 3.0]])  # three calls before the rounds
    (row,) = timed(lambda clock: {"a": lambda: clock.wait(next(lasts))}, seconds=0.1)
    assert (row.low, row.seconds, row.high, row.rounds) == (2.0, 3.0, 4.0, FEWEST)


def test_what_fails_leaves_its_error_and_the_others_run():
    def bad() -> None:
        raise torch.OutOfMemoryError("too large\nby far")

    first, second = timed(lambda clock: {"bad": bad, "good": lambda: clock.wait(0.1)})
    assert first.error == "OutOfMemoryError: too large"
    assert first.seconds == 0
    assert second.seconds == pytest.approx(0.1)
    turns = iter(range(4))
    late, steady = timed(lambda clock: {"late": lambda: clock.wait(0.1 / (3 - next(turns))), "good": clock.tick})
    assert late.error == "ZeroDivisionError: float division by zero"
    assert (late.seconds, steady.rounds) == (0, 14)  # one second of 0.05 and 0.02
    broken = Case("rms_norm", "1", "forward", "float32", 1, "GB/s", ("a", "b"), lambda: 1 / 0)
    assert [r.error for r in run(broken, 1.0)] == ["ZeroDivisionError: division by zero"] * 2


def test_a_kernel_shorter_than_its_dispatch(monkeypatch):
    gpu, clock = FakeGpu(monkeypatch), timing.Clock()

    def compiled(first: list[float]) -> None:
        gpu.launch(first.pop() if first else 30e-6, 5e-6)

    def many_launches() -> None:
        for _ in range(100):
            gpu.launch(30e-6, 1e-6)

    calls = {"short": partial(gpu.launch, 30e-6, 5e-6), "compiled": partial(compiled, [2.0]), "many": many_launches}
    monkeypatch.setattr("benchmarks.runner.extra_memory", lambda call: None)
    rows = run(case_of(calls), 0.001, clock, clock.timed)
    assert [row.error for row in rows] == [""] * 3
    assert [row.seconds for row in rows] == pytest.approx([5e-6, 5e-6, 100e-6])
    assert [row.host for row in rows] == pytest.approx([30e-6, 30e-6, 3e-3])


def test_a_call_that_waits_for_the_gpu(monkeypatch):
    """What the GPU waits for the host within the call counts, what it does before does not; no host time of its own."""
    gpu, clock = FakeGpu(monkeypatch), timing.Clock()

    def call() -> None:
        gpu.launch(30e-6, 5e-6)
        gpu.synchronize()
        gpu.launch(30e-6, 5e-6)

    monkeypatch.setattr("benchmarks.runner.extra_memory", lambda call: None)
    (row,) = run(case_of({"waits": call}), 0.001, clock, clock.timed)
    assert (row.seconds, row.host) == (pytest.approx(40e-6), None)


@pytest.mark.parametrize("quick", [True, False])
def test_every_case_names_what_it_builds(quick):
    cases = list(every_case(Scale(quick)))
    assert {c.op for c in cases} >= {"rms_norm", "softmax", "cross_entropy", "linear_cross_entropy", "rope", "swiglu"}
    titles = [(c.title, c.sweep) for c in cases]
    assert len(set(titles)) == len(titles)
    for case in cases:
        assert any(OURS in name for name in case.implementations), case.title
    if quick:
        for case in cases:
            if case.op not in ("training step", "drop-in"):  # which want a process group
                assert tuple(case.build()) == case.implementations, case.title


def test_what_decides_is_measured_first():
    kinds = [(case.op == "drop-in", bool(case.sweep)) for case in every_case(Scale())]
    assert kinds == sorted(kinds)
    assert {(True, False), (False, True), (False, False)} == set(kinds)


def test_pytest_benchmark_runs_the_same_cases():
    which = "rope and bfloat16 and (PyTorch or cpu) and not place"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", which]
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    found = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 passed" in found.stdout


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    """An installed copy inside somebody else's repository must not bear that one's."""
    root = tmp_path / "repository"
    inside = root / "site-packages" / "fastllm" / "benchmarks"
    inside.mkdir(parents=True)
    monkeypatch.delenv("FASTLLM_COMMIT", raising=False)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(timing, "__file__", str(inside / "timing.py"))
    assert timing.commit() == "unknown"
    monkeypatch.setattr(timing, "__file__", str(root / "benchmarks" / "timing.py"))
    assert len(timing.commit()) == 12
    monkeypatch.setenv("FASTLLM_COMMIT", "b0e0cd6a")
    assert timing.commit() == "b0e0cd6a"
