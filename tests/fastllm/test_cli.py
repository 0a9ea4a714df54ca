"""The commands, as people give them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllm import __version__
from fastllm.cli import main
from fastllm.config import Config
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.weights import save_weights
from fastllm.planning.presets import PRESETS
from fastllm.run_dir import load_metadata
from fastllm.training.metrics import read_log
from fastllm.training.signals import StopSignals
from tests.limits import HANG

TINY = """
[model]
vocab_size = 400
max_seq_len = 32
dim = 64
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 96

[optim]
lr = 5e-3

[train]
steps = 60
global_batch_tokens = 512
log_every = 5
eval_every = 20
eval_tokens = 1024
"""
FILES = {
    "checkpoints", "config.toml", "log.jsonl", "loss.png", "model.safetensors", "run.json", "sample.txt",
    "tokenizer.json", "tokens",
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in conftest.py


@dataclass
class Done:
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def start(*words: object, cwd: Path, python: Sequence[str] = ("-m", "fastllm")) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, *python, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> Done:
    try:
        stdout, stderr = process.communicate(timeout=HANG)
    finally:
        process.kill()
    return Done(process.returncode, stdout, stderr)


@pytest.fixture
def run(work, capsys, monkeypatch) -> Callable[..., Done]:
    """The command in this process, in the folder ``work``: starting PyTorch takes longer than most tests."""
    monkeypatch.chdir(work)

    def run(*words: object) -> Done:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # tyro's own errors and help
            code = end.code
        return Done(code, *capsys.readouterr())

    return run


def error_of(done: Done) -> str:
    """The one line that a failed command wrote to stderr."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fastllm: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a configuration and a text."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(TINY)
    lines = [f"def add_{i}(value):\n    return value + {i * 7 % 50}\n\n\n" for i in range(1500)]
    (folder / "text.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(work) -> tuple[Path, str]:
    """A finished run, and what its training printed."""
    words = ("train", "tiny.toml", "--data", "text.py", "--out", "runs/one", "--optim.lr", "4e-3")
    done = finish(start(*words, cwd=work))
    assert done.returncode == 0, done.stderr
    return work / "runs" / "one", done.stdout


def test_help(run):
    done = run("--help")
    assert done.returncode == 0
    for words in ("train ", "generate ", "fastllm train --data", '--prompt "def "'):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert run("--version").stdout == f"fastllm {__version__}\n"
    assert run().stdout == done.stdout


def test_help_comes_without_waiting_for_torch(work):
    code = "import sys, fastllm.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    done = finish(start(cwd=work, python=("-c", code)))
    assert done.returncode == 0
    assert "usage: fastllm" in done.stdout


def test_a_missing_extra(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tyro" else find(name))
    assert error_of(run("train")) == 'fastllm: error: tyro not installed: pip install "fastllm-kernels[train]"'


def test_help_of_the_commands(run):
    done = run("train", "--help")
    assert done.returncode == 0
    for words in ("CONFIG.toml", "--preset", "--data", "--out", "--train.steps N", "peak learning rate [0.004]"):
        assert words in done.stdout
    assert "--model.kv-heads" not in done.stdout
    assert f"peak learning rate [{PRESETS['124m'].optim.lr}]" in run("train", "--preset", "124m", "--help").stdout
    everything = run("train", "--help-all").stdout
    assert everything.count("\n  --") == sum(len(fields(section)) for section in vars(Config()).values()) + 4
    for command in ("train", "generate", "chat", "serve", "export", "plan"):
        lines = run(command, "--help").stdout.splitlines()
        assert len(lines) <= 60  # two screens
        assert max(map(len, lines)) <= 115
        described = [line for line in lines if line.startswith("  --") and line[37:38] == " "]  # others: below
        assert all(re.search(r"\w{3}", line[38:]) for line in described)
    done = run("generate", "--help")
    assert done.returncode == 0
    for words in ("--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed"):
        assert words in done.stdout


def test_a_run_learns_and_leaves_its_files(trained):
    folder, printed = trained
    assert {p.name for p in folder.iterdir()} == FILES
    meta = json.loads((folder / "run.json").read_text())
    assert meta["status"] == "finished"
    assert meta["step"] == meta["steps"] == 60
    assert meta["validation_loss"] < meta["unigram_loss"] - 1
    assert f"{meta['validation_loss']:.3f}" in printed
    assert f"{meta['unigram_loss']:.3f}" in printed
    assert "fastllm generate runs/one" in printed
    assert (folder / "sample.txt").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lr = 0.004" in (folder / "config.toml").read_text()
    assert all(t.dtype == torch.float32 for t in load_file(folder / "model.safetensors").values())


def test_the_log(trained):
    records = [json.loads(line) for line in (trained[0] / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(5, 61, 5))
    keys = {"step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory"}
    assert set(steps[0]) == keys
    assert all(0 < r["mfu"] < 1.5 and r["memory"] > 2**20 for r in steps)
    assert [r["step"] for r in records if "validation_loss" in r] == [20, 40, 60]


def test_generate(trained, run):
    words = ("generate", "runs/one", "--prompt", "def ", "--max-tokens", 20, "--temperature", 0.5)
    first, again, other = run(*words), run(*words), run(*words, "--seed", 1)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert first.stdout == again.stdout != other.stdout
    assert "note" not in first.stderr
    long = run("generate", "runs/one", "--prompt", "def add_1(value):\n" * 20, "--max-tokens", 5)
    assert "tokens; the context is 32 tokens, the answer included" in error_of(long)
    full = run("generate", "runs/one", "--prompt", "def", "--max-tokens", 40, "--temperature", 5, "--top-k", 0)
    assert "note: the context of 32 tokens is full" in full.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "caf\udce9"), "the prompt is not valid UTF-8 text"),
        (("--seed", 2**64), "--seed must be from 0 to 2**64 - 1"),
        (("--min-p", 2), "--min-p must be"),
        (("--prompt", "a", "--prompts", "b.txt"), "--prompt and --prompts exclude each other"),
        (("--prompts", "none.jsonl"), "can't read the prompts none.jsonl"),
        (("--out", "out.jsonl"), "--out goes with --prompts"),
        (("--temperature", "nan"), "--temperature must"),
        (("--top-p", "nan"), "--top-p must"),
    ],
)
def test_odd_options_of_generate(words, message, trained, run):
    assert message in error_of(run("generate", "runs/one", *words))


def test_odd_prompts(trained, run):
    for words in (("--prompt", ""), ("--prompt", " "), ("--prompt", "日本 "), ("--top-k", 10**30)):
        for temperature in (0, 1e-320, "inf"):
            done = run("generate", "runs/one", *words, "--max-tokens", 5, "--temperature", temperature)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_diverged(temperature, trained, work, run):
    """Weights that are not finite, and finite ones whose logits are not."""
    folder = work / "runs" / f"diverged-{temperature}"
    shutil.copytree(trained[0], folder)
    tensors = load_file(folder / "model.safetensors")
    for value, message in ((float("nan"), "are not finite: model.norm.weight"), (3e38, "logits are not finite")):
        tensors["model.norm.weight"].fill_(value)
        save_file(tensors, folder / "model.safetensors")
        error = error_of(run("generate", folder, "--prompt", "def", "--temperature", temperature))
        assert message in error
        assert str(folder) in error


def test_a_run_with_the_tokenizer_of_another(trained, work, run):
    folder = work / "runs" / "swapped"
    shutil.copytree(trained[0], folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    save_weights(folder / "model.safetensors", load_file(folder / "model.safetensors"), {"tokenizer": "another"})
    assert "trained with another tokenizer" in error_of(run("generate", folder))
    assert "trained with another tokenizer" in error_of(run("export", folder, work / "swapped-hf"))
    metadata = {"tokenizer": tokenizer.fingerprint}
    save_weights(folder / "model.safetensors", load_file(folder / "model.safetensors"), metadata)
    assert run("generate", folder, "--max-tokens", 2).returncode == 0


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "words",
    [("--help",), ("plan", "--help"), ("generate", "runs/one", "--max-tokens", 2)],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_output_that_can_not_be_written(words, trained, work):
    done = written_to_full(words, work, subprocess.PIPE)
    assert done.stderr == "fastllm: error: can't write to standard output: No space left on device\n"
    assert done.returncode == 2


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_no_output_at_all(work):
    assert written_to_full(("--version",), work, subprocess.STDOUT).returncode == 2


def written_to_full(words: Sequence[object], work: Path, stderr: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastllm", *map(str, words)]
    with FULL.open("w") as full:
        return subprocess.run(
            command, cwd=work, env=ENVIRONMENT, stdout=full, stderr=stderr, text=True, timeout=HANG, check=False
        )


def test_a_reader_that_leaves(work):
    process = start("--help", cwd=work)
    process.stdout.close()
    process.wait(HANG)
    assert process.returncode == 141
    assert process.stderr.read() == ""


def test_an_encoding_that_lacks_the_text(trained, work, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    error = error_of(finish(start("generate", "runs/one", "--prompt", "日本", cwd=work)))
    assert "set PYTHONIOENCODING=utf-8" in error


@pytest.mark.parametrize("words", [("train", "--out", "runs/none"), ("generate", "runs/one"), ("plan",)])
def test_a_backend_that_is_none(words, work, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "FASTLLM_BACKEND", "x")
    error = error_of(finish(start(*words, cwd=work)))
    assert "FASTLLM_BACKEND: unknown backend 'x'; choose one of 'cuda', 'triton', 'cpu', 'torch'" in error
    assert not (work / "runs/none").exists()


@pytest.mark.parametrize("command", [("generate",), ("export",), ("train",), ("train", "--resume")])
def test_names_that_are_too_long(command, run):
    name = "x" * 300
    assert name in error_of(run(*command, name, *(["out"] if command == ("export",) else [])))


def test_an_output_name_that_is_too_long(trained, run):
    assert "File name too long" in error_of(run("export", "runs/one", "x" * 300))


def test_the_same_command_gives_the_same_weights(trained, work, run):
    done = run("train", "runs/one/config.toml", "--out", "runs/again")
    assert done.returncode == 0, done.stderr
    first, again = (load_file(work / "runs" / name / "model.safetensors") for name in ("one", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (work / "runs/one/config.toml").read_text() == (work / "runs/again/config.toml").read_text()


def test_a_run_folder_is_never_overwritten(trained, run):
    folder = trained[0]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    done = run("train", "tiny.toml", "--data", "text.py", "--out", "runs/one")
    assert "runs/one already holds a run" in error_of(done)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "did you mean 'train'?"),
        (("train", "--preset", "124"), "'124m'"),
        (("train", "none.toml"), "none.toml: No such file"),
        (("train", "wrong.toml"), "wrong.toml: unknown key 'layer' in [model]; did you mean 'layers'?"),
        (("train", "--model.kv-heads", "5"), "multiple of model.kv_heads"),
        (("train", "tiny.toml", "--data", "none.txt"), "none.txt: No such file"),
        (("train", "tiny.toml", "--data", "empty.txt"), "empty.txt is empty"),
        (("train", "tiny.toml", "--data", "text.py", "latin.txt"), "latin.txt is not UTF-8 text: byte 3"),
        (("train", "tiny.toml", "--data", "short.txt"), "too little data"),
        (("train", "tiny.toml", "--data", "text.py", "--out", "text.py"), "text.py is a file"),
        (("train", "old.toml"), "old.toml: 'clip' in [optim] is now called 'max_grad_norm'"),
        (("train", "guard.toml"), "guard.toml: [guard] is now called [spikes]"),
        (("train", "--optim.clip", "2"), "--optim.clip is now called --optim.max-grad-norm"),
        (("train", "--model.hidden_dim=2"), "--model.hidden-dim is now called --model.ffn-dim"),
        (("train", "--guard.policy", "stop"), "--guard.policy is now called --spikes.policy"),
        (("plan", "--recompute", "full"), "--recompute is now called --activation-checkpointing"),
        (("train", "--model.layers", "1000000000"), "GiB on each rank for its weights, gradients and optimizer"),
        (("train", "--from-weights"), "--from-weights goes with --resume RUN"),
        (("train", "--out", "a" * 300), "File name too long"),
        (("generate", "none"), "no run folder none"),
        (("chat", "runs/one"), "runs/one has no chat template"),
        (("generate", "."), "has no config.toml"),
        (("generate", "none", "--top-p", "0"), "--top-p"),
    ],
)
def test_a_mistake_gets_one_clear_line(words, message, work, run):
    (work / "wrong.toml").write_text("[model]\nlayer = 3")
    (work / "old.toml").write_text("[optim]\nclip = 2.0")
    (work / "guard.toml").write_text("[guard]\nlimit = 2")
    (work / "empty.txt").write_text("")
    (work / "latin.txt").write_bytes(b"caf\xe9")
    (work / "short.txt").write_text("short")
    assert message in error_of(run(*words))


def test_an_unknown_option_gets_the_near_ones(run):
    done = run("train", "--train.step", "5")
    assert done.returncode == 2
    assert "--train.steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_training_with_a_checkpoint(work, run):
    out = work / "runs" / "stopped"
    process = start("train", "tiny.toml", "--data", "text.py", "--out", out, "--train.steps", 1_000_000, cwd=work)
    log, end = out / "log.jsonl", time.monotonic() + HANG
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        assert time.monotonic() < end, "training did not begin"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert f"fastllm generate {out}" in done.stdout
    meta = load_metadata(out)
    assert meta["status"] == "interrupted"
    assert 0 < meta["step"] < 1_000_000
    done = run("generate", out, "--max-tokens", 3)
    assert done.returncode == 0
    assert f"ended early, at step {meta['step']} of 1000000" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_has_its_usual_effect(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert signal.getsignal(number) != before
        signal.raise_signal(number)
        assert stop.caught == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))  # beyond 90 kB of a file writing fails
from fastllm.cli import main
from fastllm.config import Config
sys.exit(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_no_space_leaves_nothing_half_written(work, run):
    out = work / "runs" / "full"
    words = ("train", "tiny.toml", "--data", "text.py", "--out", out, "--train.steps", 3, "--checkpoint.every", 2)
    done = finish(start(*words, cwd=work, python=("-c", FULL_DISK)))
    assert f"can't write {out / 'model.safetensors'}: " in error_of(done)
    assert "the checkpoint of step 2 was not saved: " in done.stdout
    assert "training continues" in done.stdout
    assert "the checkpoint of step 3 was not saved: " in done.stdout
    assert {p.name for p in out.iterdir()} == FILES - {"loss.png", "model.safetensors", "sample.txt"}
    assert not list((out / "checkpoints").iterdir())
    assert "its training has not finished" in error_of(run("generate", out))


def test_a_loss_that_is_not_finite_ends_training(work, run):
    words = ("train", "tiny.toml", "--data", "text.py", "--out", "runs/nan", "--optim.lr", "1e30", "--train.steps", 30)
    error = error_of(run(*words))
    assert "spikes within 128 steps: loss " in error
    assert "gradient norm nan" in error
    assert "Lower --optim.lr" in error
    assert not (work / "runs/nan/model.safetensors").exists()


def test_resuming_a_run_that_was_stopped(work, run):
    """The same weights and log as of a run that was not."""
    words = ("train", "tiny.toml", "--data", "text.py", "--train.steps", 40, "--checkpoint.every", 15)
    assert run(*words, "--out", "runs/whole").returncode == 0
    code = "import sys, fastllm.training.trainer as l, os, signal; step = l.Trainer.train_step\n"
    code += "def stopping(self):\n step(self)\n if self.state.step == 23: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "l.Trainer.train_step = stopping\nfrom fastllm.cli import main; sys.exit(main())"
    done = finish(start(*words, "--out", "runs/cut", cwd=work, python=("-c", code)))
    assert done.returncode == 143, done.stderr
    assert "fastllm train --resume runs/cut" in done.stdout
    assert (work / "runs/cut/checkpoints/step-00000023").is_dir()
    done = run("train", "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert "from step 23 of 40" in done.stdout
    first, again = (load_file(work / "runs" / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    losses = [
        [(r["step"], r.get("loss"), r.get("validation_loss")) for r in read_log(work / "runs" / name / "log.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert "has all its 40 steps" in error_of(run("train", "--resume", "runs/cut"))
    assert "leave out --model" in error_of(run("train", "--resume", "runs/cut", "--model.layers", 3))
    assert "--optim.optimizer" in error_of(run("train", "--resume", "runs/cut", "--optim.optimizer", "muon"))
    assert "leave out the file" in error_of(run("train", "tiny.toml", "--resume", "runs/cut"))
    done = run("train", "--resume", "runs/cut", "--train.steps", 50)
    assert "from step 40 of 50" in done.stdout
    assert json.loads((work / "runs/cut/run.json").read_text())["step"] == 50


def test_a_damaged_checkpoint_is_passed_over(work, run):
    words = ("train", "tiny.toml", "--data", "text.py", "--train.steps", 30, "--checkpoint.every", 10)
    assert run(*words, "--out", "runs/damaged").returncode == 0
    last = work / "runs/damaged/checkpoints/step-00000030"
    (file,) = last.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = run("train", "--resume", "runs/damaged", "--train.steps", 40)
    assert "step-00000030 is damaged" in done.stdout
    assert "from step 20 of 40" in done.stdout
    assert done.returncode == 0


def test_traces_and_tensorboard(work, run):
    pytest.importorskip("tensorboard")
    words = ("--train.steps", 20, "--train.profile", 2, "--train.tensorboard", "--out", "runs/traced")
    done = run("train", "tiny.toml", "--data", "text.py", *words)
    assert done.returncode == 0, done.stderr
    assert (work / "runs/traced/trace.json.gz").stat().st_size > 1000
    assert "aten::mm" in (work / "runs/traced/profile.txt").read_text()
    assert list((work / "runs/traced/tensorboard").iterdir())


def test_a_time_limit_ends_training(work, run):
    words = ("--train.steps", 1_000_000, "--train.seconds", 1.5, "--train.eval-every", 1_000_000)
    done = run("train", "tiny.toml", "--data", "text.py", "--out", "runs/timed", *words)
    assert done.returncode == 0, done.stderr
    meta = json.loads((work / "runs/timed/run.json").read_text())
    assert meta["status"] == "finished"
    assert 0 < meta["step"] < 1_000_000
