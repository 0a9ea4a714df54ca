"""Runs of post-training that are stopped or killed and resumed, and on several ranks: the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllm import run_dir
from fastllm.cli import main
from fastllm.evaluation import evaluate, load_model
from fastllm.posttraining.grpo import COMPLETIONS
from fastllm.posttraining.rendering import DEFAULT_TEMPLATE
from fastllm.run_lock import LOCK
from fastllm.training.trainer import Trainer
from tests import forked
from tests.fastllm import ranks

from . import small_tune

STEPS, STOP = 5, 3  # of a run, and those after which it is stopped or killed
REWARDS = """
def vowels(completion):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))
"""
# A task that is asked during training.
ASKED = """
files = ["questions.jsonl"]
chat = true
context = "{q}"
choices = ["{a}", "{b}"]
answer = 0
"""
COMMON = (
    "--train.steps", STEPS, "--train.epochs", 9, "--train.batch-size", 5, "--train.micro-batch", 2,
    "--optim.lr", 2e-3, "--checkpoint.every", 1, "--checkpoint.keep", 9, "--train.eval-every", 2, *small_tune.ALWAYS,
)  # fmt: skip
GRPO = ("align", "--method", "grpo", "--grpo.max-tokens", 6, "--grpo.group", 3, "--grpo.train-truncated")
UPDATES = "grpo between two updates"
METHODS: dict[str, tuple[object, ...]] = {
    "sft": ("sft",),
    "teacher": ("sft", "--teacher.path", "teacher"),
    "adapters": ("sft", "--lora.rank", 2),
    "dropout": ("sft", "--lora.rank", 2, "--lora.dropout", 0.1),
    "dpo": ("align", "--method", "dpo"),
    "kto": ("align", "--method", "kto"),
    "grpo": GRPO,
    UPDATES: (*GRPO, "--grpo.updates", 2, "--grpo.kl", 0.1),
}
ASKED_METRICS = ("eval.asked.acc", "eval.asked.acc_norm")
KILLED = ("sft", "dpo", "grpo", UPDATES)
TENSOR = ("--parallel.tensor-parallel", 2)
# What two ranks do: a method, and how.
ON_RANKS: list[tuple[str, tuple[object, ...]]] = [
    *((method, ()) for method in ("sft", "adapters", "dpo", "kto", UPDATES)),
    # The teacher's has the loss of sft too.
    *((method, TENSOR) for method in ("teacher", "dpo", "kto", UPDATES)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, base) -> Path:
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("data")
    small_tune.write_rows(folder / "chats.jsonl", small_tune.chats(range(40)))
    small_tune.write_rows(folder / "pairs.jsonl", small_tune.pairs(range(40)))
    small_tune.write_rows(folder / "prompts.jsonl", [{"prompt": small_tune.question(i)} for i in range(40)])
    (folder / "rewards.py").write_text(REWARDS)
    questions = [
        {"q": small_tune.question(i), "a": small_tune.answer(i), "b": small_tune.answer(i + 1)} for i in range(9)
    ]
    small_tune.write_rows(folder / "questions.jsonl", questions)
    (folder / "asked.toml").write_text(ASKED)
    (folder / "base").symlink_to(base)
    small_tune.save_run(folder / "teacher", small_tune.small_gpt(seed=3), small_tune.tokenizer())
    return folder


def words_of(method: str, data: Path, out: Path) -> list[str]:
    command, *options = (data / "teacher" if word == "teacher" else word for word in METHODS[method])
    kind = "prompts" if "grpo" in options else "pairs" if command == "align" else "chats"
    rewards = ("--grpo.reward", f"{data / 'rewards.py'}:vowels") if kind == "prompts" else ()
    words = (command, data / "base", *options, *rewards, "--data", data / f"{kind}.jsonl", *COMMON, "--out", out)
    words += ("--train.eval-tasks", data / "asked.toml")
    return [*map(str, words)]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The run of a method by one process, once."""
    folder = tmp_path_factory.mktemp("finished")

    def get(method: str) -> Path:
        out = folder / method.replace(" ", "-")
        if not out.exists():
            small_tune.tune(*words_of(method, data, out))
        return out

    return get


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy", symlinks=True))


def losses(run: Path) -> list[float]:
    return small_tune.log(run, "loss")


# ---- stopped and killed ----


def assert_same_run(run: Path, other: Path) -> None:
    """To the last bit."""
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(other)
    assert small_tune.log(run, "grad_norm") == small_tune.log(other, "grad_norm")
    assert small_tune.log(run, "validation_loss")[-1] == small_tune.log(other, "validation_loss")[-1]
    ours, theirs = (load_file(folder / run_dir.WEIGHTS) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if (other / COMPLETIONS).exists():  # those of a rollout that was killed are sampled and written again
        assert len({*completions(run)}) == len({*completions(other)}) > 1
        assert {*completions(run)} == {*completions(other)}


def completions(run: Path) -> list[str]:
    return (run / COMPLETIONS).read_text().splitlines()


def signalled_at(step: int, number: signal.Signals) -> Any:
    """A train_step that the signal meets in that step, after the checkpoint of the one before it."""
    one = Trainer.train_step

    def train_step(self: Trainer) -> None:
        last = self.state.step == step - 1
        if last:
            self.checkpoints.wait()
        one(self)
        if last:
            os.kill(os.getpid(), number)

    return train_step


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_bitwise(method, data, finished, tmp_path, monkeypatch):
    words = words_of(method, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled_at(STOP, signal.SIGTERM))
        small_tune.tune(*words, code=128 + signal.SIGTERM)
    metadata = run_dir.load_metadata(tmp_path / "run")
    assert (metadata["status"], metadata["step"]) == ("interrupted", STOP)
    assert load_file(tmp_path / "run" / run_dir.WEIGHTS)
    small_tune.tune(words[0], "--resume", tmp_path / "run")
    assert run_dir.load_metadata(tmp_path / "run")["status"] == "finished"
    assert_same_run(tmp_path / "run", finished(method))


def kill_all(rank: int, data: Path, folder: Path) -> None:
    """Each method in a process of its own, which is killed in the step after the checkpoint of step STOP."""
    Trainer.train_step = signalled_at(STOP + 1, signal.SIGKILL)  # type: ignore[method-assign]  # meant
    for number, method in enumerate(KILLED):
        child = os.fork()
        if not child:
            small_tune.tune(*words_of(method, data, folder / str(number)))
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, method


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    forked.run(kill_all, (data, folder), 1)
    return folder


@pytest.mark.parametrize("method", KILLED)
def test_a_killed_run_resumes_bitwise(method, killed, finished, tmp_path):
    run = copy_of(killed / str(KILLED.index(method)), tmp_path)
    assert run_dir.load_metadata(run)["status"] == "training" and (run / LOCK).exists()
    assert not (run / run_dir.WEIGHTS).exists()
    assert len(losses(run)) == STOP
    small_tune.tune(METHODS[method][0], "--resume", run)
    assert_same_run(run, finished(method))


def test_without_a_checkpoint_it_begins_again(killed, finished, tmp_path):
    """The examples and the reference are those that are there."""
    run = copy_of(killed / str(KILLED.index("dpo")), tmp_path)
    shutil.rmtree(run / "checkpoints")
    small_tune.tune("align", "--resume", run)
    assert_same_run(run, finished("dpo"))


# ---- several ranks ----


def run_cases(rank: int, data: Path, folder: Path, ports: list[int]) -> None:
    for number, (method, more) in enumerate(ON_RANKS):
        os.environ["MASTER_PORT"] = str(ports[number])
        try:
            small_tune.tune(*words_of(method, data, folder / str(number)), *more, "--checkpoint.every", 99)
        except BaseException:
            (folder / f"{number}.{rank}.error").write_text(f"{method}:\n{traceback.format_exc()}")
            raise


@pytest.fixture(scope="module")
def on_ranks(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    try:
        ranks.run(2, run_cases, data, folder, [ranks.free_port() for _ in ON_RANKS])
    except Exception:
        errors = [path.read_text() for path in folder.glob("*.error")]
        raise AssertionError("\n".join(errors) or traceback.format_exc()) from None
    return folder


@pytest.mark.parametrize("number", range(len(ON_RANKS)), ids=[f"{m}{' tensor' * bool(o)}" for m, o in ON_RANKS])
def test_two_ranks_give_the_same_numbers(number, on_ranks, finished):
    """5 items a step in micro-batches of 2: unevenly shared, and in one micro-batch a rank has none."""
    ours, expected = on_ranks / str(number), finished(ON_RANKS[number][0])
    assert run_dir.load_metadata(ours)["world_size"] == 2
    for name in ("loss", "grad_norm", "validation_loss", "entropy", "length", "reward", "margin", "kl", *ASKED_METRICS):
        values = [torch.tensor(small_tune.log(run, name)) for run in (ours, expected)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    theirs = load_file(expected / run_dir.WEIGHTS)
    for name, weight in load_file(ours / run_dir.WEIGHTS).items():
        assert (weight - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
    if (expected / COMPLETIONS).exists():
        assert completions(ours) == completions(expected)


@pytest.mark.parametrize("method", ["sft", "adapters"])
def test_tasks_are_asked_of_the_model_as_it_is(method, data, finished):
    """The last answers are those of the weights that are saved: of adapters, with these merged into them."""
    run = finished(method)
    model = load_model(run, torch.device("cpu"), torch.float32)
    found = evaluate(model, [str(data / "asked.toml")])["asked"]
    for metric in ("acc", "acc_norm"):
        asked = small_tune.log(run, f"eval.asked.{metric}")
        assert len(asked) == 4  # before the first step, every two, and at the end
        assert asked[-1] == found[metric]


# ---- what is refused ----


REFUSED = {
    "data": (("--data.max-seq-len", "64"), "continues with the [data] of the run"),
    "adapters": (("--lora.rank", "8"), "continues with the [lora] of the run"),
    "batch size": (("--train.batch-size", "2"), "continues with the train.seed and train.batch_size"),
    "seed": (("--train.seed", "2"), "continues with the train.seed and train.batch_size"),
    "a folder": (("--out", "other"), "leave out MODEL and --out"),
    "other files": (("--data", "other.jsonl"), "continues with the [data] of the run"),
    "another method": (("--method", "ipo"), "is a run of fastllm align --method dpo: continue it with that command"),
    "a method's option": (("--preferences.beta", "0.2"), "continues with the [preferences] of the run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_is_resumed_with_its_own_settings_alone(name, finished, tmp_path, capsys):
    options, message = REFUSED[name]
    run = copy_of(finished("dpo"), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["align", "--resume", str(run), "--train.steps", "9", *options]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_what_can_not_be_resumed_says_why(method, finished, tmp_path, capsys):
    run, command = finished(method), str(METHODS[method][0])
    assert main([command, "--resume", str(run)]) == 2
    assert f"has all its {STEPS} steps" in capsys.readouterr().err
    copy = copy_of(run, tmp_path)
    examples = copy / "examples.safetensors"
    content = bytearray(examples.read_bytes())
    content[-1] ^= 1
    examples.write_bytes(content)
    assert main([command, "--resume", str(copy), "--train.steps", "9"]) == 2
    assert "examples.safetensors are damaged" in capsys.readouterr().err
    metadata = run_dir.load_metadata(copy) | {"base_weights": "00000000"}
    (copy / run_dir.METADATA).write_text(json.dumps(metadata))
    assert main([command, "--resume", str(copy), "--train.steps", "9"]) == 2
    assert "is not the model that the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "method", "known"),
    [
        ("align", "sft", "sft"),
        ("align --method dpo", "grpo", "align --method grpo"),
        ("sft", "dpo", "align --method dpo"),
        ("sft", "", "train"),
        ("align", "", "train"),
    ],
)
def test_a_run_is_resumed_by_its_own_command(words, method, known, finished, data, capsys):
    run = finished(method) if method else data / "base"
    assert main([*words.split(), "--resume", str(run), "--train.steps", "9"]) == 2
    assert f"is a run of fastllm {known}: continue it with that command" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["teacher", "grpo"])
def test_it_is_resumed_from_another_folder(method, data, finished, tmp_path, monkeypatch):
    """Files that were named relative to the working directory are found."""
    words = [word.replace(f"{data}/", "") for word in words_of(method, data, tmp_path / "run")]
    template = ["--data.chat-template", "template.jinja"]
    (data / "template.jinja").write_text(DEFAULT_TEMPLATE)
    monkeypatch.chdir(data)
    small_tune.tune(*words, *template, "--train.steps", STOP)
    monkeypatch.chdir(tmp_path)
    small_tune.tune(words[0], "--resume", "run", "--train.steps", STOP + 1)
    assert small_tune.log(tmp_path / "run", "step")[-1] == STOP + 1


def test_a_finished_run_goes_on_for_more_steps(finished, tmp_path):
    run = copy_of(finished("sft"), tmp_path)
    small_tune.tune("sft", "--resume", run, "--train.steps", STEPS + 2)
    assert small_tune.log(run, "step")[-1] == STEPS + 2
    assert losses(run)[:STEPS] == losses(finished("sft"))


def test_mistakes_at_the_command_line(data, tmp_path, capsys):
    base, chats = str(data / "base"), str(data / "chats.jsonl")
    for words, message in (
        (["sft"], "which model?"),
        (["sft", base], "there is no data: give files with --data"),
        (["sft", base, "--data", chats, "--out", str(data)], "is not empty"),
        (["sft", base, "--data", chats, "--data.weights", "other=1"], "data.weights has 'other'"),
        (["sft", base, "--data", chats, "--teacher.path", "nowhere"], "there is no run folder "),
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
    assert len(shown.splitlines()) <= 50
    assert max(map(len, shown.splitlines())) <= 120
