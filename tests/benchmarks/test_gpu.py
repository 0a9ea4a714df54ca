"""The GPU command, without a GPU: limits, what is left behind after each step, goals and the tar."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attention as attention_cases
from benchmarks import build, cases, goals, gpu, losses, norm
from benchmarks.cases import Scale
from benchmarks.gpu import LIMIT, Outcome, Record, Step, run_steps
from benchmarks.gpu import run as run_step
from benchmarks.record import FILE, Result, Row
from fastllm.kernels import backends
from tests.limits import HANG


def python(code: str, name: str = "step", seconds: float = 30.0) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that may be written to, with what a run writes beside its results."""
    for name in gpu.WRITTEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.record.FOLDER", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr("benchmarks.timing.device_name", lambda: "a-gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


def contents(tar: Path) -> set[str]:
    with tarfile.open(tar) as file:
        return set(file.getnames())


# ---- limits ----


def test_each_half_ends_in_time():
    first, second = gpu.halves(Path("out"))
    for half in (first, second):
        assert sum(step.seconds for step in half) <= gpu.HALF - 10
        assert all(step.seconds > gpu.LEAST for step in half)
        assert half[0].name == "build"
    assert [step.name for step in second][-2:] == ["memcheck", "racecheck"]
    assert 2 * gpu.HALF <= 9.5 * 60


def test_a_step_out_of_time_is_interrupted_and_recorded(tmp_path, monkeypatch):
    """The time is out when the step is under way, and no other limit counts, however busy the machine."""
    begun, wait = tmp_path / "begun", subprocess.Popen.wait

    def out_of_time_once_begun(process: subprocess.Popen, timeout: float | None = None) -> int:
        if timeout != 40 - gpu.GRACE:
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
    outcome = run_step(python(code), tmp_path, 40)
    assert outcome.verdict == "FAILED (not done in 40 s)"
    assert outcome.last_line == "what there is"


def test_a_step_that_can_not_be_interrupted_is_killed(tmp_path):
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(1000)"
    )
    outcome = run_step(python(code), tmp_path, 2)
    assert outcome.verdict == "FAILED (not done in 2 s)"
    assert outcome.seconds < HANG


def test_verdicts(tmp_path):
    assert run_step(python("exit(3)"), tmp_path, HANG).verdict == "FAILED (exit 3)"
    assert run_step(python("print(1)"), tmp_path, HANG).verdict == "passed"
    assert run_step(Step("none", [str(tmp_path / "none")], 30), tmp_path, HANG).verdict.startswith("FAILED (")
    told = Step("told", [sys.executable, "-c", f"print({LIMIT!r})"], 30)
    assert run_step(told, tmp_path, 130.0).last_line == "100"


def test_time_that_is_left_goes_to_later_steps(tmp_path, monkeypatch):
    """And what a step takes too much comes off theirs, down to none."""
    now, limits, lasts = [0.0], {}, {"a": 20.0, "b": 10.0, "c": 100.0, "d": 1.0}

    def run(step: Step, out: Path, limit: float) -> Outcome:
        limits[step.name] = limit
        now[0] += lasts[step.name]
        return Outcome(step.name, "passed", 0.0, "")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    record = Record(tmp_path, None, afresh=True)
    assert not run_steps([Step(name, [], 30) for name in lasts], record, 125.0)
    assert limits == {"a": 35, "b": 45, "c": 65}
    assert record.outcomes["d"].verdict == "FAILED (no time left)"


# ---- what is left behind ----


def test_a_run_from_end_to_end(checkout, monkeypatch, capsys):
    """A step that fails hides no other, the results are in the tar, and the last line says what to do."""
    out = checkout / "benchmarks" / "results" / "a-gpu"
    fails = python("print('why'); print('FAILED here'); exit(1)", "tests")
    writes = python(f"open({str(out / FILE)!r}, 'w').write('{{}}')", "report")
    told = python(f"open({str(out / 'goals.md')!r}, 'w').write('| a goal |'); print('1 of 7 goals met')", "goals")
    halves = [python("print('built')", "build"), fails], [python("", "build"), writes, told]
    monkeypatch.setattr(gpu, "halves", lambda out: halves)
    tar = checkout / "out" / "gpu.tgz"
    monkeypatch.setenv("OUT", str(tar.parent))
    assert gpu.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  | why" in lines
    assert [line.split()[0] for line in lines if line.endswith(" ...")] == ["build", "tests", "report", "goals"]
    assert lines[-1] == (
        "FAILED: tests (see the logs). Goals: 1 of 7 goals met. "
        "To commit: benchmarks/results/a-gpu kernels/measured.py README.md benchmarks/README.md"
    )
    text = (out / "steps.md").read_text()
    assert "| tests | FAILED (exit 1) |" in text and "| a goal |" in text and lines[-1] in text
    folder = "benchmarks/results/a-gpu"
    assert contents(tar) >= {f"{folder}/{name}" for name in (FILE, "tests.log", "steps.md", "steps.json")} | {
        *gpu.WRITTEN
    }


def test_the_second_half_keeps_what_the_first_found(checkout, monkeypatch, capsys):
    halves = [python("", "tiles")], [python("", "goals")]
    monkeypatch.setattr(gpu, "halves", lambda out: halves)
    assert gpu.main(["--half", "1"]) == gpu.main(["--half", "2"]) == 0
    text = (checkout / "benchmarks" / "results" / "a-gpu" / "steps.md").read_text()
    assert "| tiles | passed |" in text and "| goals | passed |" in text
    assert gpu.main(["--half", "1"]) == 0
    text = (checkout / "benchmarks" / "results" / "a-gpu" / "steps.md").read_text()
    assert "| goals | passed |" not in text


def test_an_end_midway_leaves_what_was_done(checkout, monkeypatch):
    def run(step: Step, out: Path, limit: float) -> Outcome:
        if step.name == "tests":
            raise MemoryError
        return run_step(step, out, limit)

    halves = [python("print('built')", "build"), python("", "tests")], []
    monkeypatch.setattr(gpu, "halves", lambda out: halves)
    monkeypatch.setattr(gpu, "run", run)
    with pytest.raises(MemoryError):
        gpu.main(["--half", "1", "--tar", str(checkout / "r.tgz")])
    assert "| build | passed |" in (checkout / "benchmarks" / "results" / "a-gpu" / "steps.md").read_text()
    assert "benchmarks/results/a-gpu/build.log" in contents(checkout / "r.tgz")


def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch):
    started = []

    def interrupted(process: subprocess.Popen, limit: float) -> int:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step(python("import time; time.sleep(1000)"), tmp_path, 30)
    assert started[0].wait(HANG) == -9


def test_the_tar_stays_small(checkout):
    out = checkout / "benchmarks" / "results" / "a-gpu"
    out.mkdir(parents=True)
    (out / "tests.log").write_bytes(os.urandom(10**6) + b"the end")
    (out / ".part").write_text("")
    gpu.write_tar(out, checkout / "r.tgz")
    assert (checkout / "r.tgz").stat().st_size < 400_000
    with tarfile.open(checkout / "r.tgz") as tar:
        names = tar.getnames()
        assert tar.extractfile("benchmarks/results/a-gpu/tests.log").read().endswith(b"the end")
    assert len(names) == 1 + len(gpu.WRITTEN)


def test_the_commands_take_their_arguments(monkeypatch, capsys):
    """Of the build and the tests, which have none of ours, no more is tried here."""
    for step in {step.name: step for half in gpu.halves(Path("out")) for step in half}.values():
        _, _, name, *arguments = step.command[step.command.index(sys.executable) :]
        module = importlib.import_module("benchmarks.__main__" if name == "benchmarks" else name)
        if step.name == "build":
            assert module.main and not arguments
        elif step.name != "tests":
            words = [word.replace(LIMIT, "9") for word in arguments]
            monkeypatch.setattr(sys, "argv", [name, *words, "--help"])
            with pytest.raises(SystemExit) as end:
                module.main()
            assert end.value.code == 0, step.name
            text = capsys.readouterr().out
            assert all(word in text for word in words if word.startswith("--")), step.name


def test_a_build_of_these_sources_is_not_repeated(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "BUILT", tmp_path / "build" / "for-gpu")
    ran = []

    def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
        ran.append("check" if "-c" in command else "install")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build.subprocess, "run", run)
    assert build.main() == build.main() == 0
    assert ran == ["install", "check", "check"]
    monkeypatch.setattr(build, "digest", lambda: "other sources")
    monkeypatch.setattr(build, "CHECK", "")
    assert build.main() == 0
    assert ran[3:] == ["install", "check"]


# ---- goals ----


def result(rates: dict[tuple[str, str, str], float], name: str = "NVIDIA H100 80GB HBM3") -> Result:
    rows = []
    for (op, size, direction), seconds in rates.items():
        work = 7e12 if direction == "forward+backward" else 2e12
        rows.append(Row(op, size, direction, "bfloat16", "fastllm triton", work, "TFLOP/s", seconds=seconds))
        rows.append(replace(rows[-1], implementation="SDPA cuDNN", seconds=seconds / 100))
        rows.append(replace(rows[-1], implementation="fastllm", seconds=seconds / 100, sweep="tokens"))
    return Result({"device": "d", "gpu": name}, rows=rows)


def test_goals_are_met_missed_or_not_measured():
    shape = "1×16×16384×128"
    rates = {
        ("flash_attention", shape, "forward"): 2 / 648,
        ("flash_attention", shape, "forward+backward"): 2 / 648 + 5 / 275,
    }
    found = goals.verdicts(result(rates))
    assert [str(v) for v in found[:3]] == ["met", "missed by 50.0%", "not measured"]
    assert found[1].rate == pytest.approx(275)
    line = goals.summary(found)
    assert line == f"1 of 7 goals met; flash_attention backward {shape} missed by 50.0%; 5 not measured"
    assert (
        f"| flash_attention forward {shape} | 648 TFLOP/s | FlashAttention-3 | 648 (fastllm triton) | met |"
        in goals.table(found)
    )
    assert {str(v) for v in goals.verdicts(None)} == {"not measured"}


def test_goals_of_bandwidth_follow_the_gpus():
    found = {v.goal.name: v.figure for v in goals.verdicts(result({}, "NVIDIA H200"))}
    assert found["rms_norm forward 4096×65536"] == pytest.approx(3020 * 4800 / 3350)
    assert found["flash_attention forward 1×16×16384×128"] == 648


def test_every_op_is_measured_in_triton_and_in_cuda():
    for op in backends.OPS.values():
        inference = op.name in ("packed_linear", "rope_append")  # which CUDA C++ has not
        there = {"fastllm triton"} if inference else {"fastllm triton", "fastllm cuda"}
        assert {*cases.ours(op.function, kernels=("triton", "cuda"))} == there


def test_every_goal_is_measured_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cases, "ON_GPU", True)
    found = {
        (case.op, case.direction, case.size, case.unit)
        for family in (norm, losses, attention_cases)
        for case in family.cases(Scale())
        if not case.sweep
    }
    for goal in goals.GOALS:
        for direction in ("forward", "forward+backward") if goal.direction == "backward" else (goal.direction,):
            assert (goal.op, direction, goal.size, goal.unit) in found, goal.name
