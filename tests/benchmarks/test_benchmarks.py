"""The benchmark command: timing in turns, what is kept of it, comparison, report."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import accuracy, defaults, report
from benchmarks.cases import COPY, OURS, PYTORCH, Case, Scale, is_ours, is_theirs
from benchmarks.compare import compare, table
from benchmarks.gpu import Step, steps
from benchmarks.gpu import run as run_step
from benchmarks.record import Result, Row, best
from benchmarks.runner import FEWEST, run
from benchmarks.suite import every_case
from fastllm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def compiled_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, which other tests want, is too slow for all ops."""
    monkeypatch.setattr(accuracy.backends, "TRITON_INTERPRET", False)


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


# ---- the runner ----


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


# ---- comparing ----


def rows(seconds: dict[str, float], noise: float = 0.02, rounds: int = 25) -> list[Row]:
    base = Row("rms_norm", "2×3", "forward+backward", "float32", "", 1e9, "GB/s", rounds=rounds)
    return [
        replace(base, implementation=name, seconds=s, low=s * (1 - noise), high=s * (1 + noise))
        for name, s in seconds.items()
    ]


def verdicts(before: list[Row], after: list[Row]) -> list[str]:
    return [c.verdict for c in compare(Result({}, rows=before), Result({}, rows=after))]


BEFORE = {COPY: 1.0, PYTORCH: 8.0, "fastllm cpu": 2.0}


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (BEFORE, "same"),
        (BEFORE | {"fastllm cpu": 2.06}, "same"),  # less than is worth a word
        (BEFORE | {"fastllm cpu": 2.4}, "slower"),
        (BEFORE | {"fastllm cpu": 1.6}, "faster"),
        ({name: 1.5 * s for name, s in BEFORE.items()}, "same"),  # the machine was slower, for all
        ({COPY: 1.5, PYTORCH: 12.0, "fastllm cpu": 4.0}, "slower"),  # and we more than that
    ],
)
def test_verdicts(after, verdict):
    assert verdicts(rows(BEFORE), rows(after)) == [verdict]


def test_noise_hides_what_it_could_have_made():
    after = BEFORE | {"fastllm cpu": 2.4}
    assert verdicts(rows(BEFORE, noise=0.3, rounds=5), rows(after, noise=0.3, rounds=5)) == ["same"]
    assert verdicts(rows(BEFORE, noise=0.3, rounds=500), rows(after, noise=0.3, rounds=500)) == ["slower"]


def test_a_run_differs_from_the_next_by_more_than_its_quartiles_tell():
    """Controls that drift apart by 8%, in nine of ten cases, excuse as much in ours, in the tenth too."""
    names = [PYTORCH, COPY, "fastllm cpu"]

    def run_of(change: float) -> list[Row]:
        found = rows(dict.fromkeys(names, 1.0))
        for n in range(9):
            apart = dict(zip(names, (1.04, 0.96, change), strict=True)) if change else dict.fromkeys(names, 1.0)
            found += [replace(r, size=str(n)) for r in rows(apart)]
        return found

    for ours, verdict in ((1.15, "same"), (1.6, "slower"), (0.6, "faster")):
        assert verdicts(run_of(0), run_of(ours))[1:] == [verdict] * 9
    alone = rows({PYTORCH: 1.0, COPY: 1.0, "fastllm cpu": 1.15})
    assert verdicts(run_of(0), [*alone, *run_of(1.0)[3:]])[0] == "same"


def test_pure_noise_is_rarely_called_a_change():
    """Rounds drawn from one distribution, twice: three standard errors leave a few in a thousand."""
    draw = random.Random(0)

    def measured() -> list[Row]:
        def calls(clock: FakeClock) -> dict[str, Callable[[], Any]]:
            return {n: lambda s=s: clock.wait(s * math.exp(draw.gauss(0, 0.1))) for n, s in BEFORE.items()}

        return timed(calls, seconds=11 * 20)

    found = [verdict for _ in range(200) for verdict in verdicts(measured(), measured())]
    assert found.count("same") >= 196


def test_comparison_on_the_command_line(tmp_path, capsys):
    for name, seconds in (("a", BEFORE), ("b", BEFORE | {"fastllm cpu": 3.0})):
        Result({}, rows=rows(seconds)).write(tmp_path / f"{name}.json")
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert command.main(["--compare", *paths]) == 1
    assert "| fastllm cpu | slower | 1.50 |" in capsys.readouterr().out
    assert command.main(["--compare", *reversed(paths)]) == 0
    assert "0 slower, 1 faster, 0 same" in capsys.readouterr().out
    assert "| slower |" not in table([])


# ---- what is written ----


def test_results_round_trip(tmp_path):
    result = Result({"device": "d"}, {"copy": 9.0}, rows(BEFORE), [accuracy.Error("a", "b", "c", "d", 1.0, 2.0, True)])
    result.write(tmp_path / "deep" / "r.json")
    assert Result.read(tmp_path / "deep" / "r.json") == result
    (tmp_path / "old.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="no result file of version 1"):
        Result.read(tmp_path / "old.json")


def test_the_best_leaves_its_inputs_alone():
    found = rows({COPY: 0.5, "fastllm cpu": 2.0, "fastllm cpu, in place": 1.0, PYTORCH: 4.0, "SDPA flash": 3.0})
    assert best(found, is_ours).implementation == "fastllm cpu"
    assert best(found, is_theirs).implementation == "SDPA flash"


def test_a_gpus_report_has_shares_of_its_data_sheet():
    stamp = {"device": "d", "gpu": "NVIDIA H200", "timed": "in turns"}
    slow = replace(rows({PYTORCH: 1.0})[0], error="OutOfMemoryError: a|b", seconds=0.0)
    found = [*rows({"fastllm cuda": 0.001}), slow]  # 1e9 bytes in a millisecond
    text = report.report(Result(stamp, {"copy": 4000.0, "bfloat16": 700.0, "float32": 50.0}, found), [])
    assert "Its data sheet says 4800 GB/s and 989 TFLOP/s." in text
    assert "| 1,000 GB/s | 25% | 21% |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "OutOfMemoryError: a/b" in table[-1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of a made-up machine, errors of one op if none is named, and no pages written beforehand."""
    measure = accuracy.measure
    monkeypatch.setattr(command.accuracy, "measure", lambda only: measure(only or ("swiglu",)))
    monkeypatch.setattr(command.peaks, "measure", lambda seconds: {"copy": 10.0, "bfloat16": 0.1, "float32": 0.1})
    monkeypatch.setattr(command, "_back_memory", lambda: None)


def test_a_run_from_end_to_end(small, tmp_path):
    assert command.main(["--quick", "--only", "rope", "--seconds", "0.02", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## rope" in text
    assert "| fastllm cpu, in place |" in text
    assert "timed in turns" in text
    assert "| rope | bfloat16 | cpu | output 0 " in text
    assert "![times as fast as PyTorch](speedup.png)" in text
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["version"] == 1
    assert set(result["stamp"]) >= {"device", "commit", "torch", "triton", "python", "threads", "timed"}


def test_some_ops_again_keep_the_others(small, tmp_path, monkeypatch):
    old = [*rows(BEFORE), replace(rows({PYTORCH: 3.0})[0], op="rope")]
    Result({"commit": "before"}, rows=old, errors=[accuracy.Error("a", "b", "c", "d", 1.0, 2.0, True)]).write(
        tmp_path / "results.json"
    )
    again = case_of({PYTORCH: lambda: None, "fastllm cpu": lambda: None})
    monkeypatch.setattr(command, "every_case", lambda scale: [again])
    command.measure(tmp_path, Scale(True, 0.01), ("rms_norm",))
    result = Result.read(tmp_path / "results.json")
    assert [(r.op, r.implementation, r.commit) for r in result.rows] == [
        ("rms_norm", PYTORCH, ""), ("rms_norm", "fastllm cpu", ""), ("rope", PYTORCH, "before"),
    ]  # fmt: skip
    assert {e.op for e in result.errors} == {"a", "rms_norm"}
    assert "Some rows are of other commits: before" in (tmp_path / "report.md").read_text()


def test_an_interrupted_run_keeps_what_it_has(small, tmp_path, monkeypatch):
    first = case_of({PYTORCH: lambda: None, "fastllm cpu": lambda: None})

    def once(case: Case, seconds: float) -> list[Row]:
        if case is not first:
            raise KeyboardInterrupt
        return run(case, seconds)

    monkeypatch.setattr(command, "run", once)
    monkeypatch.setattr(command, "every_case", lambda scale: [first, replace(first, dtype="bfloat16")])
    command.measure(tmp_path, Scale(True, 0.01), ())
    assert len(Result.read(tmp_path / "results.json").rows) == 2
    assert "## rms_norm" in (tmp_path / "report.md").read_text()


def test_some_ops_again_lose_nothing_until_there_is_something_newer(small, tmp_path, monkeypatch):
    first, second = case_of({PYTORCH: lambda: None}), replace(case_of({}), dtype="bfloat16")

    def once(case: Case, seconds: float) -> list[Row]:
        if case is second:
            raise KeyboardInterrupt
        return run(case, seconds)

    monkeypatch.setattr(command, "run", once)
    monkeypatch.setattr(command, "every_case", lambda scale: [first, second])
    old = [*rows(BEFORE), *(replace(r, dtype="bfloat16") for r in rows(BEFORE))]
    Result({"commit": "before"}, rows=old).write(tmp_path / "results.json")
    command.measure(tmp_path, Scale(True, 0.01), ("rms_norm",))
    found = Result.read(tmp_path / "results.json").rows
    assert {(r.dtype, r.commit) for r in found} == {("float32", ""), ("bfloat16", "before")}
    assert len(found) == 1 + len(BEFORE)


def test_nothing_measured_leaves_what_there_was(small, tmp_path, monkeypatch):
    def interrupted(case: Case, seconds: float) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    monkeypatch.setattr(command, "every_case", lambda scale: [case_of({})])
    Result({"commit": "before"}, rows=rows(BEFORE)).write(tmp_path / "results.json")
    command.measure(tmp_path, Scale(True))
    assert Result.read(tmp_path / "results.json").rows == rows(BEFORE)


def test_an_end_of_time_leaves_cases_out_and_says_so(small, tmp_path, monkeypatch):
    first, clock = case_of({}), FakeClock()

    def measured(case: Case, seconds: float) -> list[Row]:
        clock.wait(60)
        return rows(BEFORE)

    monkeypatch.setattr(command, "every_case", lambda scale: [first, replace(first, op="rope", sweep="tokens")])
    monkeypatch.setattr(command, "run", measured)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=clock))
    command.measure(tmp_path, Scale(True), within=50)
    assert {r.op for r in Result.read(tmp_path / "results.json").rows} == {"rms_norm"}
    assert "left out rope by tokens" in (tmp_path / "report.md").read_text()


def test_what_decides_is_measured_first():
    kinds = [(case.op == "drop-in", bool(case.sweep)) for case in every_case(Scale())]
    assert kinds == sorted(kinds)
    assert {(True, False), (False, True), (False, False)} == set(kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "rmsnorm", "rope"], "--only: there is no rmsnorm to measure; choose from rms_norm, softmax"),
        (["--compare", "none.json", "none.json"], "can't read none.json: No such file"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"benchmarks: error: {message}")
    assert found.count("\n") == 1


def test_errors_are_within_the_rule():
    found = list(accuracy.measure())
    assert {(e.op, e.backend) for e in found} >= {("flash_attention", "cpu"), ("cross_entropy", "torch")}
    assert {"dq", "dk", "dv", "output"} <= {e.output for e in found if e.op == "flash_attention"}
    assert [e for e in found if not e.within] == []


def test_the_verdict_on_errors_can_be_no(monkeypatch):
    def softmax(x: torch.Tensor, backend: str) -> torch.Tensor:
        if backend != "torch" and x.dtype == torch.float16:
            raise RuntimeError("no kernel\nfor this")
        return torch.softmax(x, -1) * (1 if backend == "torch" else 1.001)

    monkeypatch.setattr(accuracy, "softmax", softmax)
    found = list(accuracy.measure(("softmax",)))
    assert {e.op for e in found} == {"softmax"}
    assert {e.within for e in found if e.backend == "torch"} == {True}
    cpu = {(e.dtype, e.output): e.within for e in found if e.backend == "cpu"}
    assert not cpu["float32", "output"] and not cpu["float16", "RuntimeError: no kernel"]
    result = Result({"device": "d", "timed": "in turns"}, errors=found)
    assert "| softmax | float16 | cpu | RuntimeError: no kernel | **no** |" in report.report(result, [])


def test_the_readme_is_generated():
    assert report.readme() in report.README.read_text(), "python -m benchmarks --readme"


def test_defaults_follow_from_the_results():
    assert defaults.FILE.read_text() == defaults.text(), "python -m benchmarks --defaults"
    both = rows({"fastllm triton": 2.0, "fastllm cuda": 1.0, PYTORCH: 9.0})
    other = [replace(r, size="9×9", seconds=s) for r, s in zip(both, (1.0, 1.5, 9.0), strict=True)]
    assert defaults.fastest(Result({}, rows=[*both, *other])) == {"rms_norm": "cuda"}
    forward = [replace(r, direction="forward", seconds=s) for r, s in zip(both, (1.0, 99.0, 9.0), strict=True)]
    assert defaults.fastest(Result({}, rows=[*both, *forward])) == {"rms_norm": "cuda"}
    assert defaults.fastest(Result({}, rows=forward)) == {"rms_norm": "triton"}
    assert defaults.fastest(Result({}, rows=rows({"fastllm cpu": 1.0}))) == {}


# ---- the GPU command ----


def test_the_gpu_command_ends_within_eight_minutes():
    assert sum(step.seconds for step in steps(Path("out"))) <= 8 * 60


def test_a_step_out_of_time_is_interrupted_and_recorded(tmp_path):
    code = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('what there is')"
    outcome = run_step(Step("slow", [sys.executable, "-c", code], 10), tmp_path)
    assert outcome.verdict == "FAILED (not done in 10 s)"
    assert outcome.last_line == "what there is"
    assert run_step(Step("bad", [sys.executable, "-c", "exit(3)"], 30), tmp_path).verdict == "FAILED (exit 3)"
    assert run_step(Step("good", [sys.executable, "-c", "print(1)"], 30), tmp_path).verdict == "passed"
    assert run_step(Step("none", [str(tmp_path / "none")], 30), tmp_path).verdict.startswith("FAILED (")


def test_pytest_benchmark_runs_the_same_cases():
    which = "rope and bfloat16 and (PyTorch or cpu) and not place"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", which]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 passed" in found.stdout
