"""A resumed run loses nothing, and says what is true."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastllm import run_lock
from fastllm.cli import main
from fastllm.config import load
from fastllm.data.loader import IGNORE_INDEX
from fastllm.data.token_data import TokenData
from fastllm.data.token_shards import write_tokens
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.weights import read_weights_metadata, save_weights
from fastllm.run_dir import load_metadata, load_run
from fastllm.training import pretrain, trainer
from fastllm.training.final_weights import read_record
from fastllm.training.run_data import RunData, load_run_data, open_tokens
from tests.fastllm import small_run
from tests.fastllm.small_run import Ended, train_command

TINY = f"""
{small_run.TOML_MODEL}
[optim]
lr = 1e-2
[train]
global_batch_tokens = 128
steps = 20
log_every = 5
eval_every = 10
eval_tokens = 512
[checkpoint]
every = 10
keep = 9
"""


@pytest.fixture
def train(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """``fastllm train`` in this process, in ``tmp_path``; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def train(*words: object) -> str:
        return train_command(capsys, *words, codes=(0, 130))

    return train


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(3000)))
    run = folder / "run"
    assert main(["train", str(folder / "tiny.toml"), "--data", str(folder / "text.txt"), "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(run: Path) -> None:
    """As if it had been killed after step 10."""
    shutil.rmtree(run / "checkpoints" / "step-00000020")


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def run_data_of(run: Path) -> RunData:
    config = load(run / "config.toml")
    return load_run_data(config, open_tokens(config, run))


def interrupt_at(step: int, monkeypatch) -> None:
    one = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> None:
        one(self)
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


# ---- what is said of it ----


def test_tokens_are_counted_as_they_were_trained_on(run, train):
    cut(run)
    train("--resume", run, "--train.global-batch-tokens", 256)
    data = run_data_of(run)
    counts = [int((data.train.batch(first, n)["targets"] != IGNORE_INDEX).sum()) for first, n in ((0, 40), (40, 40))]
    counts.append(int((data.train.batch(80, 40)["targets"] != IGNORE_INDEX).sum()))
    assert 10 * 128 * 0.9 < counts[0] <= 10 * 128
    assert load_metadata(run)["tokens"] == sum(counts)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if "loss" in line][-2:] == [sum(counts[:2]), sum(counts)]


def test_bits_per_byte_are_those_of_the_evaluation(run, train):
    cut(run)
    printed = train("--resume", run, "--train.eval-tokens", 96)
    data = run_data_of(run)
    assert len(data.validation) == 3
    targets = data.validation.batch(0, 3)["targets"]
    bytes_per_token = data.tokens.tokenizer.byte_lengths()[targets[targets != IGNORE_INDEX].numpy()].mean()
    loss = load_metadata(run)["validation_loss"]
    assert f"({loss / math.log(2) / bytes_per_token:.3f} bits per byte)" in printed
    assert load_metadata(run)["bytes_per_token"] == bytes_per_token


def test_a_loss_of_another_evaluation_is_not_kept(run, train, monkeypatch):
    cut(run)
    interrupt_at(11, monkeypatch)
    train("--resume", run, "--train.eval-tokens", 96)
    assert load_metadata(run)["validation_loss"] is None


# ---- what can't go on changes nothing ----

REFUSED = {
    "seed": (("--train.seed", 1), "--resume continues with --train.seed 0 of the run: leave it out"),
    "steps done": ((), "has all its 20 steps; for more give a larger --train.steps"),
    "fewer steps": (("--train.steps", 5), "has all its 5 steps; for more give a larger --train.steps"),
    "seconds spent": (
        ("--train.steps", 30, "--train.seconds", 1e-3),
        "of training are spent, --train.seconds is 0.001",
    ),
    "weights asked for": (("--train.steps", 30, "--from-weights"), "has checkpoints: leave out --from-weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, run, train):
    words, message = REFUSED[name]
    before = contents(run)
    with pytest.raises(Ended, match=message):
        train("--resume", run, *words)
    assert contents(run) == before


def test_another_tokenizer_of_the_same_size(run, train):
    size = load(run / "config.toml").model.vocab_size
    other = Tokenizer.train([" ".join(f"{word}{word[::-1]}" for word in sorted(dir(os)))], size)
    assert other.vocab_size == size
    other.save(run / "tokenizer.json")
    with pytest.raises(Ended, match=r"tokenizer\.json is not the tokenizer that the run began with"):
        train("--resume", run, "--train.steps", 30)


def test_other_tokens(run, train):
    """A whole folder, of the same tokenizer."""
    tokenizer = TokenData([run / "tokens"]).tokenizer
    shutil.rmtree(run / "tokens")
    with write_tokens(run / "tokens", tokenizer) as writer:
        for i in range(400):
            writer.add(np.array(tokenizer.encode(f"{i} times {i} is more")), "text", i << 32)
    with pytest.raises(Ended, match=r"run/tokens has not the tokens that the run began with"):
        train("--resume", run, "--train.steps", 30)


def test_a_damaged_shard(run, train):
    path = run / "tokens" / "00000.tokens"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(Ended, match=r"00000\.tokens is damaged"):
        train("--resume", run, "--train.steps", 30)


def test_a_run_of_an_earlier_version(run, train):
    shutil.rmtree(run / "tokens")
    (run / "data").mkdir()
    with pytest.raises(Ended, match=r"run has its tokens in data/\*\.npy, as an earlier version of fastllm wrote them"):
        train("--resume", run, "--train.steps", 30)


# ---- stopped or killed after its last step ----


def stopped(run: Path, train: Callable[..., str], monkeypatch) -> None:
    (run / "model.safetensors").unlink()
    cut(run)
    with monkeypatch.context() as patched:
        interrupt_at(20, patched)
        assert "after step 20 of 20" in train("--resume", run)


class Killed(BaseException):
    """As a kill, of which the command line says nothing."""


def killed(*args: object) -> None:
    raise Killed


def killed_before_the_weights(run: Path, train: Callable[..., str], monkeypatch) -> None:
    cut(run)
    (run / "model.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "save_final", killed)
        with pytest.raises(Killed):
            train("--resume", run)
    assert not (run / "model.safetensors").exists()


def killed_after_the_weights(run: Path, train: Callable[..., str], monkeypatch) -> None:
    metadata = load_metadata(run) | {"status": "training", "step": 0}
    (run / "run.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("happened", [stopped, killed_before_the_weights, killed_after_the_weights])
def test_the_end_is_made_up_for(happened, run, train, monkeypatch):
    weights, loss = load_file(run / "model.safetensors"), load_metadata(run)["validation_loss"]
    (run / "sample.txt").unlink()
    happened(run, train, monkeypatch)
    printed = train("--resume", run)
    assert "from step 20 of 20" in printed
    metadata, record = load_metadata(run), read_record(run)
    assert (metadata["status"], metadata["step"], metadata["validation_loss"]) == ("finished", 20, loss)
    assert (record.finished, record.step, record.validation_loss) == (True, 20, loss)
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (run / "sample.txt").exists()
    assert not list(run.glob("model-*"))
    with pytest.raises(Ended, match="has all its 20 steps"):
        train("--resume", run)


# ---- the weights ----


def test_without_checkpoints_the_weights_stay(run, train):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(Ended, match=r"run has no checkpoint; to go on from its weights, .*: add --from-weights"):
        train("--resume", run, "--train.steps", 30)
    assert contents(run) == before


def test_with_none_intact_the_weights_stay(run, train):
    for folder in (run / "checkpoints").iterdir():
        (folder / "checkpoint.json").write_text("{}")
    before = contents(run)
    with pytest.raises(Ended, match=r"has no intact checkpoint; .*: move .*checkpoints away and add --from-weights"):
        train("--resume", run, "--train.steps", 30)
    assert contents(run) == before


def test_to_go_on_from_the_weights(run, train):
    shutil.rmtree(run / "checkpoints")
    before = load_metadata(run)
    printed = train("--resume", run, "--train.steps", 40, "--from-weights")
    assert "from the weights of step 20, with a fresh optimizer" in printed
    after = load_metadata(run)
    assert (after["step"], after["tokens"]) == (40, 40 * 128)
    assert after["validation_loss"] < before["validation_loss"]
    assert read_record(run).finished


def test_an_early_end_does_not_replace_the_weights_of_a_finished_run(run, train, monkeypatch):
    before = (run / "model.safetensors").read_bytes()
    interrupt_at(21, monkeypatch)
    printed = train("--resume", run, "--train.steps", 400)
    assert "model.safetensors stays that of step 20, of the finished run; the checkpoint has 21" in printed
    assert (run / "model.safetensors").read_bytes() == before
    assert load_metadata(run)["status"] == "interrupted"
    assert "from step 21 of 400" in train("--resume", run, "--train.steps", 400, "--train.seconds", 1)


def test_nor_those_of_a_later_step(run, train, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    with monkeypatch.context() as patched:
        interrupt_at(16, patched)
        train("--resume", run, "--train.steps", 40)
    record = read_record(run)
    assert (record.finished, record.step) == (True, 20)


def test_finished_weights_that_are_worse_are_put_beside(run, train):
    before = (run / "model.safetensors").read_bytes()
    printed = train("--resume", run, "--train.steps", 24, "--optim.lr", 1.0, "--optim.schedule", "linear")
    assert "those from before are in model-step-00000020.safetensors" in printed
    assert (run / "model-step-00000020.safetensors").read_bytes() == before
    assert read_record(run).step == 24


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000])
def test_damaged_weights_do_no_harm(content, run, train):
    """Neither to what goes on from a checkpoint, nor to the weights at its end; nothing is overwritten."""
    (run / "model.safetensors").write_bytes(content)
    (run / "model-before.safetensors").write_bytes(b"others")
    train("--resume", run, "--train.steps", 24)
    assert read_record(run).step == 24
    assert (run / "model-before.safetensors").read_bytes() == b"others"
    assert (run / "model-before-2.safetensors").read_bytes() == content


def test_better_ones_replace_them(run, train):
    train("--resume", run, "--train.steps", 60)
    assert read_record(run).step == 60
    assert not list(run.glob("model-*"))


RECORDS = {
    "a field is missing": lambda record: record["state"].pop("validation_loss"),
    "a word for a number": lambda record: record["state"].update(tokens="x"),
    "a word for a loss": lambda record: record["state"].update(validation_loss="x"),
    "a word for true": lambda record: record.update(finished="no"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_none(name, run, train):
    """It counts as none: nothing fails at the end of a run, and the weights are kept."""
    path = run / "model.safetensors"
    record = json.loads(read_weights_metadata(path)["training"])
    RECORDS[name](record)
    save_weights(path, load_file(path), {"training": json.dumps(record)})
    assert read_record(run) is None
    before = path.read_bytes()
    train("--resume", run, "--train.steps", 24)
    assert read_record(run).step == 24
    assert (run / "model-before.safetensors").read_bytes() == before


def test_weights_are_as_readable_as_other_files(run):
    before = os.umask(0o022)
    try:
        for path in run.rglob("*"):
            if path.is_file():
                assert oct(path.stat().st_mode & 0o777) == "0o644", path
    finally:
        os.umask(before)


def test_the_record_of_the_weights(run):
    record, metadata = read_record(run), load_metadata(run)
    assert (record.finished, record.step) == (True, 20)
    assert record.validation_loss == metadata["validation_loss"]
    assert all(bool(t.isfinite().all()) for t in load_file(run / "model.safetensors").values())
    assert torch.is_tensor(load_run(run)[0].head_weight)


# ---- the lock ----


def test_a_run_that_is_in_training(run, train):
    before = contents(run)
    with run_lock.run_lock(run), pytest.raises(Ended, match=rf"is in training by process {os.getpid()} on "):
        train("--resume", run, "--train.steps", 30)
    assert contents(run) == before


def test_the_lock_goes_with_the_run(run, train):
    train("--resume", run, "--train.steps", 24)
    assert not (run / run_lock.LOCK).exists()


def test_a_stale_lock_is_said(run, train):
    (run / run_lock.LOCK).write_text(json.dumps({"pid": 1, "host": run_lock.socket.gethostname(), "started": "then"}))
    printed = train("--resume", run, "--train.steps", 24)
    assert "by process 1 on" in printed
    assert "(since then), ended without a word" in printed


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": "x"}', b'{"pid": 1e400}'])
def test_a_lock_that_says_nothing(content, run, train):
    (run / run_lock.LOCK).write_bytes(content)
    train("--resume", run, "--train.steps", 24)


def test_another_host(run, train):
    """Whose locks are not seen here: the file's time decides."""
    lock = run / run_lock.LOCK
    lock.write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere", "started": "then"}))
    with pytest.raises(Ended, match=r"by process \d+ on elsewhere"):
        train("--resume", run, "--train.steps", 24)
    os.utime(lock, (1, lock.stat().st_mtime - run_lock.STALE_AFTER))
    train("--resume", run, "--train.steps", 24)


def test_a_file_system_without_locks(run, train, monkeypatch):
    def flock(number: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with run_lock.run_lock(run), pytest.raises(Ended, match="is in training by process"):
        train("--resume", run, "--train.steps", 24)
    train("--resume", run, "--train.steps", 24)


def test_a_folder_that_can_not_be_written_to(run, train, monkeypatch):
    real = os.open

    def read_only(path, flags, *rest, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **kwargs)

    monkeypatch.setattr(run_lock.os, "open", read_only)
    with pytest.raises(Ended, match=r"can't write to .*run: run\.lock: Read-only file system"):
        train("--resume", run, "--train.steps", 24)
