"""The command: a run from end to end, what an interruption leaves, errors of the user."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import accuracy
from benchmarks.cases import PYTORCH, Case, Scale
from benchmarks.record import Result, Row
from benchmarks.runner import run
from tests.benchmarks.made_up import BEFORE, FakeClock, case_of, rows


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
