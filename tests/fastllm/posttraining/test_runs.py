"""Runs of post-training that are killed and resumed, and on several ranks: the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm import run_dir
from fastllm.cli import main
from fastllm.run_lock import LOCK
from tests.fastllm import ranks
from tests.limits import HANG

from . import small_tune

STEPS = 6
REWARDS = """
def vowels(completion):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))
"""
COMMON = (
    "--train.steps", STEPS, "--train.epochs", 9, "--train.batch-size", 5, "--train.micro-batch", 2,
    "--optim.lr", 2e-3, "--checkpoint.every", 1, "--checkpoint.keep", 9, "--train.eval-every", 3, *small_tune.ALWAYS,
)  # fmt: skip
GRPO = ("--method", "grpo", "--grpo.max-tokens", 6, "--grpo.group", 3, "--grpo.train-truncated")
# The command and its options, and the step that it is resumed from.
METHODS: dict[str, tuple[tuple[Any, ...], int]] = {
    "sft": (("sft",), 3),
    "adapters": (("sft", "--lora.rank", 2, "--lora.dropout", 0.1), 3),
    "dpo": (("align", "--method", "dpo"), 3),
    "kto": (("align", "--method", "kto"), 3),
    "grpo": (("align", *GRPO), 3),
    "grpo between two updates": (("align", *GRPO, "--grpo.updates", 2, "--grpo.kl", 0.1), 3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, base) -> Path:
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("data")
    small_tune.write_rows(folder / "chats.jsonl", small_tune.chats(range(40)))
    small_tune.write_rows(folder / "pairs.jsonl", small_tune.pairs(range(40)))
    small_tune.write_rows(folder / "prompts.jsonl", [{"prompt": small_tune.question(i)} for i in range(40)])
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "base").symlink_to(base)
    return folder


def words_of(method: str, data: Path, out: Path) -> list[str]:
    (command, *options), _ = METHODS[method]
    kind = "prompts" if "grpo" in method else "pairs" if command == "align" else "chats"
    rewards = ("--grpo.reward", f"{data / 'rewards.py'}:vowels") if kind == "prompts" else ()
    words = (command, data / "base", *options, *rewards, "--data", data / f"{kind}.jsonl", *COMMON, "--out", out)
    return [*map(str, words)]


@pytest.fixture(scope="module", params=METHODS)
def finished(request, data, tmp_path_factory) -> tuple[str, Path]:
    """A run of each method, by one process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(words_of(request.param, data, out)) == 0
    return request.param, out


def killed(run: Path, step: int, copy: Path) -> Path:
    """The run as it would be, had its process been killed after the checkpoint of ``step``."""
    shutil.copytree(run, copy, symlinks=True)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (copy / run_dir.WEIGHTS).unlink()
    metadata = run_dir.load_metadata(copy) | {"status": "training", "step": 0}
    run_dir.save_metadata(copy, metadata)
    return copy


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / run_dir.WEIGHTS) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([*small_tune.log(run, "loss"), *small_tune.log(run, "validation_loss")])


def test_a_killed_run_resumes_bitwise(finished, tmp_path):
    method, run = finished
    command, step = METHODS[method][0][0], METHODS[method][1]
    copy = killed(run, step, tmp_path / "copy")
    small_tune.tune(command, "--resume", copy)
    assert_same_weights(run, copy)
    assert small_tune.log(copy, "loss") == small_tune.log(run, "loss")


def on_two_ranks(rank: int, words: list[str]) -> None:
    assert main(words) == 0


def test_two_ranks_give_the_same_losses(finished, data, tmp_path):
    method, run = finished
    if method == "adapters":
        pytest.skip("dropout draws other numbers on each rank")
    out = tmp_path / "run"
    ranks.run(2, on_two_ranks, words_of(method, data, out))
    torch.testing.assert_close(losses(out), losses(run), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("finished", ["sft", "dpo", "grpo"], indirect=True)
def test_so_do_two_ranks_that_share_each_sequence(finished, data, tmp_path):
    method, run = finished
    out = tmp_path / "run"
    ranks.run(2, on_two_ranks, [*words_of(method, data, out), "--parallel.tensor-parallel", "2"])
    torch.testing.assert_close(losses(out), losses(run), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes(data, tmp_path, number):
    """SIGKILL leaves the last checkpoint; SIGTERM one more, and the weights."""
    many = ("--train.steps", "400", "--train.epochs", "99", "--checkpoint.every", "5", "--train.eval-every", "1000")
    words = [*words_of("dpo", data, tmp_path / "killed"), *many]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "fastllm", *words], stdout=subprocess.DEVNULL, env=environment)
    checkpoints = tmp_path / "killed" / "checkpoints"
    end = time.monotonic() + HANG
    while not (checkpoints.is_dir() and any("0015" in p.name for p in checkpoints.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(HANG)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    (tmp_path / "killed" / LOCK).unlink(missing_ok=True)
    reached = max(int(p.name.removeprefix("step-")) for p in checkpoints.iterdir() if p.name.startswith("step-"))
    steps = str(reached + 5)
    small_tune.tune("align", "--resume", tmp_path / "killed", "--train.steps", steps)
    assert small_tune.log(tmp_path / "killed", "step")[-1] == reached + 5
    assert (tmp_path / "killed" / run_dir.WEIGHTS).exists()


def test_a_run_is_resumed_with_its_own_settings_alone(finished, tmp_path, capsys):
    method, run = finished
    command, step = METHODS[method][0][0], METHODS[method][1]
    copy = killed(run, step, tmp_path / "copy")
    for options, message in (
        (("--data.max-seq-len", "64"), "continues with the [data] of the run"),
        (("--lora.rank", "8"), "continues with the [lora] of the run"),
        (("--train.batch-size", "2"), "continues with the train.seed and train.batch_size"),
        (("--out", str(tmp_path / "other")), "leave out MODEL and --out"),
    ):
        assert main([command, "--resume", str(copy), *options]) == 2
        assert message in capsys.readouterr().err


def test_what_can_not_be_resumed_says_why(finished, tmp_path, capsys):
    method, run = finished
    command = METHODS[method][0][0]
    assert main([command, "--resume", str(run)]) == 2
    assert f"has all its {STEPS} steps" in capsys.readouterr().err
    copy = killed(run, 3, tmp_path / "copy")
    metadata = run_dir.load_metadata(copy) | {"base_weights": "00000000"}
    (copy / run_dir.METADATA).write_text(json.dumps(metadata))
    assert main([command, "--resume", str(copy)]) == 2
    assert "is not the model that the run began with" in capsys.readouterr().err


def test_mistakes_at_the_command_line(data, tmp_path, capsys):
    base, chats = str(data / "base"), str(data / "chats.jsonl")
    for words, message in (
        (["sft"], "which model?"),
        (["sft", base], "there is no data: give files with --data"),
        (["sft", base, "--data", chats, "--out", str(data)], "is not empty"),
        (["sft", base, "--data", chats, "--data.weights", "other=1"], "data.weights has 'other'"),
        (["sft", base, "--data", chats, "--teacher.path", "nowhere"], "there is no run folder nowhere"),
        (["align", base, "--method", "ppo"], "there is no method 'ppo'"),
        (["align", base, "--method", "dpo", "--data", chats], "nothing is left of"),
        (["align", base, "--method", "dpo", "--preferences.simpo-gamma", "2", "--data", chats], "dpo has no pref"),
        (["align", base, "--method", "grpo", "--data", chats], "grpo needs a reward"),
    ):
        out = ["--out", str(tmp_path / "run")] if "--out" not in words else []
        assert main([*words, *out]) == 2, words
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["sft"], ["align"], ["align", "--method", "grpo"]])
def test_help_fits_a_screen(words, capsys):
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 75
    assert max(map(len, shown.splitlines())) <= 140
