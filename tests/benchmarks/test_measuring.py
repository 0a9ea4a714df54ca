"""Timing in turns, pytest-benchmark on the same cases, and the GPU command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import OURS, Case, Scale
from benchmarks.gpu import Step, steps
from benchmarks.gpu import run as run_step
from benchmarks.runner import FEWEST, run
from benchmarks.suite import every_case
from tests.benchmarks.made_up import FakeClock, timed
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


# ---- the GPU command ----


def test_the_gpu_command_ends_within_ten_minutes():
    assert sum(step.seconds for step in steps(Path("out"))) <= 9.5 * 60


def test_a_step_out_of_time_is_interrupted_and_recorded(tmp_path, monkeypatch):
    """The time is out when the step is under way, and no other limit counts, however busy the machine."""
    begun, wait = tmp_path / "begun", subprocess.Popen.wait

    def out_of_time_once_begun(process: subprocess.Popen, timeout: float | None = None) -> int:
        if timeout != 12 - 8:
            return wait(process, HANG)
        while process.poll() is None and not begun.exists():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", out_of_time_once_begun)
    code = f"""
import pathlib, time
try:
    pathlib.Path({str(begun)!r}).touch()
    time.sleep({HANG})
except KeyboardInterrupt:
    print("what there is")
"""
    outcome = run_step(Step("slow", [sys.executable, "-c", code], 12), tmp_path)
    assert outcome.verdict == "FAILED (not done in 12 s)"
    assert outcome.last_line == "what there is"
    assert run_step(Step("bad", [sys.executable, "-c", "exit(3)"], 30), tmp_path).verdict == "FAILED (exit 3)"
    assert run_step(Step("good", [sys.executable, "-c", "print(1)"], 30), tmp_path).verdict == "passed"
    assert run_step(Step("none", [str(tmp_path / "none")], 30), tmp_path).verdict.startswith("FAILED (")


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    """An installed copy inside somebody else's repository must not bear that one's."""
    root = tmp_path / "repository"
    inside = root / "site-packages" / "fastllm" / "benchmarks"
    inside.mkdir(parents=True)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(timing, "__file__", str(inside / "timing.py"))
    assert timing.commit() == "unknown"
    monkeypatch.setattr(timing, "__file__", str(root / "benchmarks" / "timing.py"))
    assert len(timing.commit()) == 12
