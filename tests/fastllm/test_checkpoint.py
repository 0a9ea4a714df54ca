"""Training that goes on where it was, whatever happened to the processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastllm.checkpoint import MANIFEST, Checkpoints
from fastllm.errors import UserError
from fastllm.parallel import full_state, process_group
from fastllm.report import read_log
from tests import forked
from tests.fastllm import processes, training
from tests.limits import HANG

SHARD = {"reshard": True}
# Name -> processes and options of the run that goes on from two processes' checkpoint of step 4.
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor parallel": (2, {"tensor": 2}),
    "four, hybrid and tensor": (4, {"replicate": 2, "tensor": 2}),
}


def curve(out: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(out / "log.jsonl") if "loss" in r]


def go_on(rank: int, out: str, source: str, options: dict[str, Any]) -> None:
    """Train to the end from the checkpoint in the run folder ``source``."""
    with process_group(training.CPU):
        loop = training.make(training.config(**options), Path(out))
        if rank == 0:
            shutil.copytree(Path(source, "checkpoints"), Path(out, "checkpoints"), dirs_exist_ok=True)
        dist.barrier()
        loop.restore()
        loop.run()
        if rank == 0:
            Path(out, "position.json").write_text(json.dumps(vars(loop.at)))
        weights = full_state(loop.model)
        if rank == 0:
            torch.save(weights, Path(out, "weights.pt"))


def train(rank: int, out: str, options: dict[str, Any]) -> None:
    with process_group(training.CPU):
        result = training.trace(training.config(**options), Path(out))
        if rank == 0:
            torch.save(result["weights"], Path(out, "weights.pt"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of six steps in two processes, with a checkpoint of every second."""
    out = tmp_path_factory.mktemp("whole")
    processes.run(2, train, str(out), SHARD)
    return out


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory) -> Path:
    """The same, as if it had been killed after the checkpoint of step 4."""
    out = tmp_path_factory.mktemp("cut")
    shutil.copytree(whole / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000004")
    return out


def test_the_same_processes_go_on_bitwise(whole, cut, tmp_path):
    processes.run(2, go_on, str(tmp_path), str(cut), SHARD)
    assert curve(tmp_path) == curve(whole)[4:]
    expected, actual = (torch.load(out / "weights.pt", weights_only=True) for out in (whole, tmp_path))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("name", OTHERS)
def test_other_processes_go_on(name, whole, cut, tmp_path):
    world, options = OTHERS[name]
    processes.run(world, go_on, str(tmp_path), str(cut), options)
    torch.testing.assert_close(torch.tensor(curve(tmp_path)), torch.tensor(curve(whole)[4:]), rtol=5e-6, atol=0)


def test_muon_goes_on_bitwise(tmp_path):
    options = {"optimizer": "muon", **SHARD}
    processes.run(2, train, str(tmp_path / "whole"), options)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000006")
    processes.run(2, go_on, str(tmp_path / "again"), str(tmp_path / "whole"), options)
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")[4:]


def test_no_pickle_is_in_a_checkpoint(cut):
    """Files of names and numbers, and JSON, which says what they are."""
    folder = cut / "checkpoints" / "step-00000004"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {p.name for p in folder.iterdir()} == {MANIFEST, *manifest["files"]}
    assert len(manifest["files"]) == 2
    assert manifest["position"]["step"] == 4
    for name in manifest["files"]:
        assert name.endswith(".safetensors")
        assert (folder / name).read_bytes()[8:9] == b"{"


def test_another_model_is_refused(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    with process_group(training.CPU), pytest.raises(UserError, match=r"has another model\.hidden_dim"):
        training.make(training.config(hidden_dim=64), tmp_path / "run").restore()


def test_old_checkpoints_are_deleted(tmp_path):
    with process_group(training.CPU):
        training.trace(training.config(every=1, keep=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


# ---- a loss that is not finite, on one process ----


def poisoned(rank: int, out: str, policy: str, at: tuple[int, ...]) -> None:
    """The first process's loss is not a number in these passes of the run."""
    with process_group(training.CPU):
        loop = training.make(training.config(policy=policy, steps=8, eval_every=8), Path(out))
        forward, reads = loop.model.forward, []

        def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = forward(*args, **kwargs)
            if torch.is_grad_enabled() and loop.at.sequence not in reads:
                reads.append(loop.at.sequence)
                if rank == 0 and len(reads) in at:
                    return loss * torch.nan
            return loss

        loop.model.forward = wrong
        try:
            loop.run()
            ended = {"at": vars(loop.at), "reads": reads}
        except UserError as error:
            ended = {"error": str(error)}
        except SystemExit as end:
            ended = {"exit": end.code}
        ended["finite"] = all(bool(t.isfinite().all()) for t in loop.tensors().values() if t is not loop.guard.values
                              and t is not loop.guard.worst and t is not loop.norm)  # fmt: skip
        Path(out, f"{rank}.json").write_text(json.dumps(ended))
        dist.barrier()


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_a_loss_that_is_not_finite_on_one_process(policy, tmp_path):
    processes.run(2, poisoned, str(tmp_path), policy, (4,))
    ended = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(e.pop("finite") for e in ended)
    if policy == "stop":
        assert "a spike: loss nan and gradient norm nan before step 4" in ended[0]["error"]
        assert "The last checkpoint is of step 2" in ended[0]["error"]
        assert ended[1] == {"exit": 2}
        return
    assert ended[0]["at"]["step"] == ended[1]["at"]["step"] == 8
    assert ended[0]["at"]["spikes"] == ended[1]["at"]["spikes"] == 1
    assert ended[0]["reads"] == ended[1]["reads"]
    reads = [sequence // 5 for sequence in ended[0]["reads"]]
    # Met after step 4, whose checkpoint is not yet written: back to step 2, and on with the text behind step 4.
    assert reads == (list(range(8)) if policy == "skip" else list(range(10)))
    assert ended[0]["at"]["rollbacks"] == (policy == "rollback")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "spikes" in r] == [4]
    assert all(r["loss"] is not None for r in lines if "loss" in r and r["step"] != 4)


def test_a_run_that_keeps_failing_is_stopped(tmp_path):
    processes.run(2, poisoned, str(tmp_path), "rollback", tuple(range(3, 99)))
    ended = json.loads((tmp_path / "0.json").read_text())
    assert "a spike, after 10 roll-backs: loss nan" in ended["error"]


# ---- processes that die ----

DYING = """
import os, sys
from fastllm import loop
step = loop.Loop.step
def dying(self):
    if self.at.step == int(sys.argv[-1]) and os.environ["RANK"] == "1":
        os._exit(9)
    step(self)
loop.Loop.step = dying
from fastllm.cli import main
sys.exit(main(sys.argv[1:-1]))
"""
TINY = """
[model]
vocab_size = 300
context = 32
dim = 32
layers = 1
hidden_dim = 48
[train]
batch_tokens = 128
steps = 20
log_every = 1
[checkpoint]
every = 5
"""


@pytest.mark.parametrize(("dies_at", "goes_on_from"), [(2, {0}), (12, {5, 10})])
def test_a_process_that_dies_ends_the_others(dies_at, goes_on_from, tmp_path):
    """With a message, before gloo gives up; and the run goes on from its last checkpoint, here in one process."""
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(2000)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "dying.py"]
    words += ["train", "tiny.toml", "--data", "text.txt", "--out", "run", str(dies_at)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.returncode != 0
    assert "process 0 of 2 lost the connection to another one, which ended first" in done.stderr
    assert "fastllm train --resume run goes on from the last checkpoint" in done.stderr
    words = [sys.executable, "-m", "fastllm", "train", "--resume", "run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert any(f"from step {step} of 20" in done.stdout for step in goes_on_from)
    assert [step for step, _, _ in curve(tmp_path / "run")] == list(range(1, 21))


def test_sigterm_ends_all_processes_with_all_saved(tmp_path):
    """As a cluster sends it before it takes the machine: to torchrun, which passes it on."""
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(2000)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastllm"]
    words += ["train", "tiny.toml", "--data", "text.txt", "--out", "run", "--train.steps", "1000000"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, end = tmp_path / "run" / "log.jsonl", time.monotonic() + HANG
    while not (log.exists() and log.read_text().count("\n") > 7):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    printed = process.communicate(timeout=HANG)[0]
    assert "fastllm train --resume run" in printed
    assert "lost the connection" not in printed
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert meta["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{meta['step']:08d}" / MANIFEST).exists()


def save_and_save(rank: int, world: int, port: int, folder: str, said: str) -> None:
    """Check the latest checkpoint, then save the next ones until killed; ``said`` gets the number of each saved."""
    torch.set_num_threads(1)
    found = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in found.items()})
    with process_group(training.CPU):
        checkpoints = Checkpoints(Path(folder), keep=2)
        mesh = init_device_mesh("cpu", (world,))
        parts = {f"t{i}": torch.full((300_000 // world,), -1.0) for i in range(4)}
        tensors = {name: DTensor.from_local(part, mesh, [Shard(0)]) for name, part in parts.items()}
        first = 0
        if checkpoints.steps():
            first = checkpoints.steps()[-1]
            problem = checkpoints.load(first, tensors)
            whole = all(bool((t == first).all()) for t in parts.values())
            if problem or not whole or checkpoints.facts(first)["number"] != first:
                Path(said).write_text(f"damaged: {problem}")
                return
        for step in range(first + 1, first + 10_000):
            for part in parts.values():
                part.fill_(float(step))
            checkpoints.save(step, tensors, {"number": step})
            for part in parts.values():
                part.zero_()  # what is being written is a copy
            assert checkpoints.wait() is None
            if rank == 0:
                Path(said + ".new").write_text(str(step))
                os.replace(said + ".new", said)  # whole, whenever this process is killed


def test_killed_while_saving(tmp_path):
    """Two processes, twenty times, at any moment: the last checkpoint that was finished is there, and whole."""
    world, context = 2, forked.context()
    said, last, moments, caught = tmp_path / "said", 0, random.Random(), 0
    for _ in range(20):
        args = (world, processes.free_port(), str(tmp_path / "checkpoints"), str(said))
        running = [context.Process(target=save_and_save, args=(rank, *args)) for rank in range(world)]
        before = said.read_text() if said.exists() else ""
        for process in running:
            process.start()
        end = time.monotonic() + HANG
        while all(p.is_alive() for p in running) and (said.read_text() if said.exists() else "") == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.08))
        for process in moments.sample(running, world):
            os.kill(process.pid, signal.SIGKILL)
        for process in running:
            process.join()
        assert "damaged" not in said.read_text(), said.read_text()
        number = int(said.read_text() or last)
        assert number > last
        last = number
        caught += any(p.name.startswith(".step") for p in (tmp_path / "checkpoints").iterdir())
        steps = sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith("step"))
        assert steps[-1] >= last
        assert len(steps) <= 3
    assert caught > 5  # in the middle of it
