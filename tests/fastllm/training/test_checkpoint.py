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

from fastllm.distributed.gradients import full_state_dict
from fastllm.distributed.mesh import process_group
from fastllm.errors import UserError
from fastllm.training.checkpoint import MANIFEST, Checkpointer
from fastllm.training.metrics import read_log
from tests import forked
from tests.fastllm import ranks, small_run
from tests.limits import HANG

SHARD = {"reshard_after_forward": True}
# Name -> processes and options of the run that goes on from two processes' checkpoint of step 4.
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor parallel": (2, {"tensor_parallel": 2}),
    "four, hybrid and tensor": (4, {"dp_replicate": 2, "tensor_parallel": 2}),
}


def curve(out: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(out / "log.jsonl") if "loss" in r]


def go_on(rank: int, out: str, source: str, options: dict[str, Any]) -> None:
    """Train to the end from the checkpoint in the run folder ``source``."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(**options), Path(out))
        if rank == 0:
            shutil.copytree(Path(source, "checkpoints"), Path(out, "checkpoints"), dirs_exist_ok=True)
        dist.barrier()
        trainer.restore()
        trainer.run()
        if rank == 0:
            Path(out, "state.json").write_text(json.dumps(vars(trainer.state)))
        weights = full_state_dict(trainer.model)
        if rank == 0:
            torch.save(weights, Path(out, "weights.pt"))


def train(rank: int, out: str, options: dict[str, Any]) -> None:
    with process_group(small_run.CPU):
        result = small_run.trace(small_run.config(**options), Path(out))
        if rank == 0:
            torch.save(result["weights"], Path(out, "weights.pt"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of six steps in two processes, with a checkpoint of every second."""
    out = tmp_path_factory.mktemp("whole")
    ranks.run(2, train, str(out), SHARD)
    return out


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory) -> Path:
    """The same, as if it had been killed after the checkpoint of step 4."""
    out = tmp_path_factory.mktemp("cut")
    shutil.copytree(whole / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000004")
    return out


def test_the_same_processes_go_on_bitwise(whole, cut, tmp_path):
    ranks.run(2, go_on, str(tmp_path), str(cut), SHARD)
    assert curve(tmp_path) == curve(whole)[4:]
    expected, actual = (torch.load(out / "weights.pt", weights_only=True) for out in (whole, tmp_path))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("name", OTHERS)
def test_other_processes_go_on(name, whole, cut, tmp_path):
    world, options = OTHERS[name]
    ranks.run(world, go_on, str(tmp_path), str(cut), options)
    torch.testing.assert_close(torch.tensor(curve(tmp_path)), torch.tensor(curve(whole)[4:]), rtol=5e-6, atol=0)


def test_muon_goes_on_bitwise(tmp_path):
    options = {"optimizer": "muon", **SHARD}
    ranks.run(2, train, str(tmp_path / "whole"), options)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000006")
    ranks.run(2, go_on, str(tmp_path / "again"), str(tmp_path / "whole"), options)
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")[4:]


def test_no_pickle_is_in_a_checkpoint(cut):
    """Files of names and numbers, and JSON, which says what they are."""
    folder = cut / "checkpoints" / "step-00000004"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {p.name for p in folder.iterdir()} == {MANIFEST, *manifest["files"]}
    assert len(manifest["files"]) == 2
    assert manifest["state"]["step"] == 4
    for name in manifest["files"]:
        assert name.endswith(".safetensors")
        assert (folder / name).read_bytes()[8:9] == b"{"


def test_another_model_is_refused(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    with process_group(small_run.CPU), pytest.raises(UserError, match=r"has another model\.ffn_dim"):
        small_run.make(small_run.config(ffn_dim=64), tmp_path / "run").restore()


def test_old_checkpoints_are_deleted(tmp_path):
    with process_group(small_run.CPU):
        small_run.trace(small_run.config(every=1, keep=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


# ---- a loss that is not finite, on one process ----


def poisoned(rank: int, out: str, policy: str, at: tuple[int, ...]) -> None:
    """The first process's loss is not a number in these passes of the run."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(policy=policy, steps=8, eval_every=8), Path(out))
        forward, reads = trainer.model.forward, []

        def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = forward(*args, **kwargs)
            if torch.is_grad_enabled() and trainer.state.items not in reads:
                reads.append(trainer.state.items)
                if rank == 0 and len(reads) in at:
                    return loss * torch.nan
            return loss

        trainer.model.forward = wrong
        try:
            trainer.run()
            ended = {"state": vars(trainer.state), "reads": reads}
        except UserError as error:
            ended = {"error": str(error)}
        except SystemExit as end:
            ended = {"exit": end.code}
        not_finite = (trainer.spikes.values, trainer.spikes.last_spike, trainer.metrics.grad_norm)
        others = [t for t in trainer.tensors().values() if not any(t is one for one in not_finite)]
        ended["finite"] = all(bool(t.isfinite().all()) for t in others)

        Path(out, f"{rank}.json").write_text(json.dumps(ended))
        dist.barrier()


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_a_loss_that_is_not_finite_on_one_process(policy, tmp_path):
    ranks.run(2, poisoned, str(tmp_path), policy, (4,))
    ended = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(e.pop("finite") for e in ended)
    if policy == "stop":
        assert "a spike: loss nan and gradient norm nan (usual: " in ended[0]["error"]
        assert ") before step 4. Lower --optim.lr" in ended[0]["error"]
        assert "The last checkpoint is of step 2" in ended[0]["error"]
        assert ended[1] == {"exit": 2}
        return
    assert ended[0]["state"]["step"] == ended[1]["state"]["step"] == 8
    assert ended[0]["state"]["spikes"] == ended[1]["state"]["spikes"] == 1
    assert ended[0]["reads"] == ended[1]["reads"]
    reads = [sequence // 5 for sequence in ended[0]["reads"]]
    # Noticed after step 4, before its checkpoint: back to step 2, continuing with the data after step 4.
    assert reads == (list(range(8)) if policy == "skip" else list(range(10)))
    assert ended[0]["state"]["rollbacks"] == (policy == "rollback")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "spikes" in r] == [4]
    assert all(r["loss"] is not None for r in lines if "loss" in r and r["step"] != 4)


def test_a_run_that_keeps_failing_is_stopped(tmp_path):
    ranks.run(2, poisoned, str(tmp_path), "rollback", tuple(range(3, 99)))
    ended = json.loads((tmp_path / "0.json").read_text())
    assert "a spike, after 10 rollbacks: loss nan" in ended["error"]


# ---- processes that die ----

DYING = """
import os, sys
from fastllm.training import trainer
step = trainer.Trainer.train_step
def dying(self):
    if self.state.step == int(sys.argv[-1]) and os.environ["RANK"] == "1":
        os._exit(9)
    step(self)
trainer.Trainer.train_step = dying
from fastllm.cli import main
sys.exit(main(sys.argv[1:-1]))
"""
TINY = f"""
{small_run.TOML_MODEL}
[train]
global_batch_tokens = 128
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
    assert "rank 0 of 2 lost the connection to another rank, which ended first" in done.stderr
    assert "fastllm train --resume run continues from the last checkpoint" in done.stderr
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
    with process_group(small_run.CPU):
        checkpoints = Checkpointer(Path(folder), keep=2)
        mesh = init_device_mesh("cpu", (world,))
        parts = {f"t{i}": torch.full((300_000 // world,), -1.0) for i in range(4)}
        tensors = {name: DTensor.from_local(part, mesh, [Shard(0)]) for name, part in parts.items()}
        first = 0
        if checkpoints.steps():
            first = checkpoints.steps()[-1]
            manifest = checkpoints.manifest(first)
            checkpoints.load(manifest, tensors)
            if manifest["number"] != first or not all(bool((t == first).all()) for t in parts.values()):
                Path(said).write_text("damaged")
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
        args = (world, ranks.free_port(), str(tmp_path / "checkpoints"), str(said))
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
