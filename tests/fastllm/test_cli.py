"""The commands as people run them: in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastllm import __version__
from fastllm.checkpoint import load_run

TINY = """
[model]
vocab_size = 400
context = 32
dim = 64
layers = 2
heads = 2
kv_heads = 1
hidden_dim = 96

[optim]
lr = 5e-3

[train]
steps = 60
batch_tokens = 512
log_every = 5
eval_every = 20
eval_tokens = 1024
"""
FILES = {"config.toml", "log.jsonl", "loss.png", "model.safetensors", "run.json", "sample.txt", "tokenizer.json"}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "fastllm", *map(str, words)]


def run(*words: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
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
    done = run("train", "tiny.toml", "--data", "text.py", "--out", "runs/one", "--optim.lr", "4e-3", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "runs" / "one", done.stdout


def test_help(work):
    done = run("--help", cwd=work)
    assert done.returncode == 0
    for words in ("train ", "generate ", "fastllm train --data", '--prompt "def "'):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert run("--version", cwd=work).stdout == f"fastllm {__version__}\n"
    assert run(cwd=work).stdout == done.stdout


def test_help_does_not_import_torch(work):
    code = "import sys, fastllm.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=work, check=False, capture_output=True).returncode == 0


def test_help_of_the_commands(work):
    done = run("train", "--help", cwd=work)
    assert done.returncode == 0
    for words in ("CONFIG.toml", "--preset", "--data", "--out", "--train.steps", "--model.kv-heads", "--optim.lr"):
        assert words in done.stdout
    done = run("generate", "--help", cwd=work)
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
    assert set(steps[0]) == {"step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert [r["step"] for r in records if "validation_loss" in r] == [20, 40, 60]


def test_generate(trained, work):
    words = ("generate", "runs/one", "--prompt", "def ", "--max-tokens", 40, "--temperature", 0.5)
    first, again, other = run(*words, cwd=work), run(*words, cwd=work), run(*words, "--seed", 1, cwd=work)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert first.stdout == again.stdout != other.stdout
    assert "note" not in first.stderr
    long = run("generate", "runs/one", "--prompt", "def add_1(value):\n" * 20, "--max-tokens", 5, cwd=work)
    assert "the last 32 tokens" in long.stderr


def test_the_same_command_gives_the_same_weights(trained, work):
    done = run("train", "runs/one/config.toml", "--out", "runs/again", cwd=work)
    assert done.returncode == 0, done.stderr
    first, again = (load_file(work / "runs" / name / "model.safetensors") for name in ("one", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (work / "runs/one/config.toml").read_text() == (work / "runs/again/config.toml").read_text()


def test_a_run_folder_is_never_overwritten(trained, work):
    folder = trained[0]
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    done = run("train", "tiny.toml", "--data", "text.py", "--out", "runs/one", cwd=work)
    assert "runs/one already holds a run" in error_of(done)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "did you mean 'train'?"),
        (("train", "--preset", "124"), "did you mean '124m'?"),
        (("train", "none.toml"), "none.toml: No such file"),
        (("train", "wrong.toml"), "wrong.toml: unknown key 'layer' in [model]; did you mean 'layers'?"),
        (("train", "--model.kv-heads", "3"), "multiple of model.kv_heads"),
        (("train", "tiny.toml", "--data", "none.txt"), "none.txt: No such file"),
        (("train", "tiny.toml", "--data", "empty.txt"), "empty.txt is empty"),
        (("train", "tiny.toml", "--data", "text.py", "latin.txt"), "latin.txt is not UTF-8 text: byte 3"),
        (("train", "tiny.toml", "--data", "short.txt"), "too little text"),
        (("train", "tiny.toml", "--data", "text.py", "--out", "text.py"), "text.py is a file"),
        (("generate", "none"), "no run folder none"),
        (("generate", "."), "has no config.toml"),
        (("generate", "none", "--top-p", "0"), "--top-p"),
    ],
)
def test_a_mistake_gets_one_clear_line(words, message, work):
    (work / "wrong.toml").write_text("[model]\nlayer = 3")
    (work / "empty.txt").write_text("")
    (work / "latin.txt").write_bytes(b"caf\xe9")
    (work / "short.txt").write_text("short")
    assert message in error_of(run(*words, cwd=work))


def test_an_unknown_option_gets_the_near_ones(work):
    done = run("train", "--train.step", "5", cwd=work)
    assert done.returncode == 2
    assert "--train.steps" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_a_checkpoint(number, code, work):
    out = work / "runs" / f"stopped-{code}"
    words = ("train", "tiny.toml", "--data", "text.py", "--out", out, "--train.steps", 1_000_000)
    process = subprocess.Popen(command(*words), cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") > 2):
            assert time.monotonic() < end, "training did not begin"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert f"fastllm generate {out}" in stdout
    meta = load_run(out)[2]
    assert meta["status"] == "interrupted"
    assert 0 < meta["step"] < 1_000_000
    done = run("generate", out, "--max-tokens", 3, cwd=work)
    assert done.returncode == 0
    assert f"ended early, at step {meta['step']} of 1000000" in done.stderr


def limit_file_size() -> None:
    """In the new process, writing beyond 40 kB of a file fails, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_no_space_leaves_nothing_half_written(work):
    out = work / "runs" / "full"
    words = ("train", "tiny.toml", "--data", "text.py", "--out", out, "--train.steps", 3)
    done = run(*words, cwd=work, preexec_fn=limit_file_size)
    assert "can't write" in error_of(done)
    assert str(out / "model.safetensors") in done.stderr
    assert {p.name for p in out.iterdir()} == {"config.toml", "tokenizer.json", "run.json", "log.jsonl"}
    assert "its training has not finished" in error_of(run("generate", out, cwd=work))


def test_a_loss_that_is_not_finite_ends_training(work):
    words = ("train", "tiny.toml", "--data", "text.py", "--out", "runs/nan", "--optim.lr", "1e30", "--train.steps", 30)
    assert "the loss is not finite at step" in error_of(run(*words, cwd=work))
    assert not (work / "runs/nan/model.safetensors").exists()


def test_a_time_limit_ends_training(work):
    words = ("--train.steps", 1_000_000, "--train.seconds", 1.5, "--train.eval-every", 1_000_000)
    done = run("train", "tiny.toml", "--data", "text.py", "--out", "runs/timed", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    meta = json.loads((work / "runs/timed/run.json").read_text())
    assert meta["status"] == "finished"
    assert 0 < meta["step"] < 1_000_000
