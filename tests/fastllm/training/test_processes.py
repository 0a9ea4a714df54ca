"""Processes whose terminal, launcher or neighbour goes away: they go on, or end with a checkpoint or a message."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fastllm import console
from fastllm.cli import main
from fastllm.run_dir import load_metadata
from fastllm.run_lock import LOCK
from fastllm.training.checkpoint import MANIFEST
from fastllm.training.signals import StopSignals
from tests.fastllm import small_run
from tests.limits import HANG

TINY = f"""
{small_run.TOML_MODEL}
[train]
global_batch_tokens = 128
steps = 1000000
log_every = 1
eval_every = 1000000
[checkpoint]
every = 1000000
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = ("-m", "fastllm")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# The heartbeat of tests: in a fraction of the time.
QUICK = """
import os, sys, time
from fastllm.distributed import heartbeat
heartbeat.EVERY, heartbeat.SILENCE = 0.2, 4.0
from fastllm.training.trainer import Trainer
evaluate = Trainer.evaluate
def slow(self):
    if os.environ["RANK"] == "0":
        time.sleep(6)
    evaluate(self)
Trainer.evaluate = slow
from fastllm.cli import main
sys.exit(main())
"""


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """``fastllm train`` of a run that does not end by itself, in ``tmp_path``."""
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "quick.py").write_text(QUICK)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(3000)))
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, python=COMMAND, before=(), **options) -> subprocess.Popen[str]:
        command = [*before, sys.executable, *python, "train", *map(str, words)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, **options}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        process = subprocess.Popen(command, cwd=tmp_path, text=True, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


NEW = ("tiny.toml", "--data", "text.txt", "--out", "run")


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_training(run: Path) -> bool:
    log = run / "log.jsonl"
    return log.exists() and log.read_text().count("\n") > 5


def saved(run: Path) -> bool:
    """All of a run that ended early: status, weights, checkpoint; and no lock."""
    meta = load_metadata(run)
    checkpoint = run / "checkpoints" / f"step-{meta['step']:08d}" / MANIFEST
    whole = meta["status"] == "interrupted" and (run / "model.safetensors").exists() and checkpoint.exists()
    return whole and not (run / LOCK).exists()


def ranks_of(run: Path) -> dict[int, int]:
    """The processes that train it, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") != str(run.parent):
                continue
            variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
        except OSError:
            continue
        if "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = int(folder.name)
    return found


proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@pytest.mark.parametrize("output", ["a reader that leaves", "/dev/full"])
def test_training_goes_on_without_an_output(output, start, tmp_path):
    with open("/dev/full", "w") as full:
        process = start(*NEW, "--train.steps", 30, stdout=full if output == "/dev/full" else subprocess.PIPE)
    if process.stdout is not None:
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert errors.count("can't write to the standard output") == 1
    assert load_metadata(tmp_path / "run")["status"] == "finished"


def test_on_a_terminal(start, tmp_path):
    """Where rich, as it shows progress, puts itself in the place of the standard output."""
    terminal, end = pty.openpty()
    process = start(*NEW, "--train.steps", 30, stdout=end, env={**ENVIRONMENT, "TERM": "xterm"})
    os.close(end)
    shown = b""
    with suppress(OSError):  # of the terminal, when the process has ended
        while select.select([terminal], [], [], HANG)[0] and (part := os.read(terminal, 65536)):
            shown += part
    os.close(terminal)
    if not shown.endswith(b"fastllm generate run\r\n"):
        process.kill()  # it hangs
    assert process.wait(HANG) == 0, shown[-2000:]
    assert shown.count(b"step 30/30  loss ") >= 1
    assert load_metadata(tmp_path / "run")["status"] == "finished"


def test_an_output_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    console.say("a", "line")
    assert not console.Output().isatty()


def test_a_terminal_that_closes_ends_with_all_saved(start, tmp_path):
    """It sends SIGHUP, often twice."""
    process = start(*NEW)
    wait_for(lambda: is_training(tmp_path / "run"))
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    process.stdout = None
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode == 128 + signal.SIGHUP, errors
    assert saved(tmp_path / "run")


def test_nohup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.caught
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            assert signals.caught == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


@proc
def test_ranks_whose_launcher_is_killed_end_with_all_saved(start, tmp_path):
    run = tmp_path / "run"
    launcher = start(*NEW, python=(*TORCHRUN, "quick.py"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: is_training(run))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not ranks_of(run))
    assert saved(run)


@proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named(rank, start, tmp_path):
    """Not one that is slow: rank 0 takes six seconds to begin an evaluation, more than the silence that is allowed."""
    run = tmp_path / "run"
    words = [*NEW, "--train.eval-every", 8]
    process = start(*words, python=(*TORCHRUN, "quick.py"), stdout=subprocess.DEVNULL)
    wait_for(lambda: (run / "log.jsonl").exists() and "validation_loss" in (run / "log.jsonl").read_text())
    stopped = ranks_of(run)[rank]
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: 1 - rank not in ranks_of(run))
    os.kill(stopped, signal.SIGKILL)  # torchrun waits half a minute before it does
    errors = process.communicate(timeout=HANG)[1]
    assert process.returncode != 0
    assert f"fastllm: error: rank {rank} (process {stopped} on " in errors
    assert "has not answered for 4 s" in errors
    assert "fastllm train --resume run continues from the last checkpoint" in errors


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"])
def test_variables_that_are_no_numbers(name, monkeypatch, capsys, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    for other in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(other, "x" if other == name else "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: name == "LOCAL_RANK")
    assert main(["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]) == 2
    assert (
        f"the environment variable {name} must be a number, as torchrun sets it; it is 'x'" in capsys.readouterr().err
    )
