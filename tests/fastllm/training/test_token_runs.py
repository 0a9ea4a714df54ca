"""Runs on folders of tokens: one or more, sources in proportion, and what a resumed run checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastllm.data.token_shards import document_key, write_tokens
from fastllm.data.tokenizer import Tokenizer
from fastllm.run_dir import load_metadata
from fastllm.training import trainer
from tests.fastllm import small_run
from tests.fastllm.small_run import Ended, train_command

TINY = f"""
{small_run.TOML_MODEL}
[optim]
lr = 1e-2
[train]
global_batch_tokens = 128
steps = 6
log_every = 1
eval_every = 3
eval_tokens = 512
[checkpoint]
every = 3
"""
WEIGHTS = ("--data.weights", "sums=3", "words=1")
ANNEAL = ("--data.anneal-weights", "sums=0", "words=1", "--data.anneal-from", "0.5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """tokens of two sources, more of one of them, and others of another tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    sums = [f"{i} times {i} is {i * i}\n" * (1 + i % 5) for i in range(300)]
    words = [f"the word {i} " * (1 + i % 40) for i in range(200)]
    tokenizer = Tokenizer.train(sums + words, 300)
    for name, using, texts in (
        ("tokens", tokenizer, [("sums", sums), ("words", words)]),
        ("more", tokenizer, [("sums", [text[::-1] for text in sums])]),
        ("other", Tokenizer.train(words, 280), [("words", words)]),
    ):
        with write_tokens(folder / name, using, shard_tokens=2000) as writer:
            for source, documents in texts:
                for text in documents:
                    writer.add(np.array(using.encode(text)), source, document_key(text))
    return folder


@pytest.fixture
def train(folders, tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """``fastllm train`` in this process, in a folder with the tokens; returns what it printed."""
    shutil.copytree(folders, tmp_path / "w")
    (tmp_path / "w" / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path / "w")

    def train(*words: object) -> str:
        return train_command(capsys, *words)

    return train


def losses(run: str) -> list[float]:
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
def test_a_run_on_tokens_has_no_copy_of_them(packing, train):
    train("tiny.toml", "--data", "tokens", "more", "--out", "run", "--data.packing", packing)
    assert not Path("run/tokens").exists()
    assert Path("run/tokenizer.json").read_bytes() == Path("tokens/tokenizer.json").read_bytes()
    assert load_metadata(Path("run"))["status"] == "finished"
    assert losses("run")[-1] < losses("run")[0]
    train("--resume", "run", "--train.steps", 9)
    assert len(losses("run")) == 9


@pytest.mark.parametrize("options", [(), WEIGHTS, (*WEIGHTS, *ANNEAL)], ids=["plain", "weights", "schedule"])
def test_a_resumed_run_has_the_same_numbers(options, train):
    train("tiny.toml", "--data", "tokens", "--out", "whole", *options)
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-00000006")
    Path("cut/model.safetensors").unlink()
    train("--resume", "cut")
    whole, cut = (load_file(f"{name}/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses("cut")[-3:] == losses("whole")[-3:]


def test_a_schedule_is_of_all_steps(train):
    train("tiny.toml", "--data", "tokens", "--out", "run", *WEIGHTS, *ANNEAL)
    with pytest.raises(Ended, match="the weights move over 24 sequences in the checkpoint and over 48 in this run"):
        train("--resume", "run", "--train.steps", 12)
    train("tiny.toml", "--data", "tokens", "--out", "constant", *WEIGHTS)
    train("--resume", "constant", "--train.steps", 12)


def test_what_is_said_of_a_mixture(train):
    printed = train("tiny.toml", "--data", "tokens", "--out", "run", *WEIGHTS)
    assert "sums: 75.0% of the run" in printed
    assert "words: 25.0% of the run" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "tokens", "other"), "other has another tokenizer than tokens"),
        (("--data", "tokens", "tiny.toml"), "tokens is a folder of tokens and tiny.toml is not: tokenize it too"),
        (("--data", "tokens", "--data.weights", "sums=1"), "data.weights has no weight of 'words'"),
        (("--data", "tokens", "--data.weights", "sum=1", "words=1"), "did you mean 'sums'"),
        (("--data", "tokens", *WEIGHTS, "--data.anneal-weights", "words=1"), "has no weight of 'sums'"),
        (("--data", "tokens", "--data.anneal-weights", "words=1"), "data.anneal_weights needs data.weights"),
        (
            ("--data", "tokens", "--model.max-seq-len", "65536", "--train.global-batch-tokens", "65536"),
            "too little data",
        ),
    ],
)
def test_what_is_refused_leaves_no_folder(words, message, train):
    with pytest.raises(Ended) as error:
        train("tiny.toml", *words, "--out", "run")
    assert message in str(error.value)
    assert not Path("run").exists()


def test_tokens_that_have_changed(train):
    train("tiny.toml", "--data", "tokens", "--out", "run")
    shutil.rmtree("tokens")
    shutil.copytree("more", "tokens")
    with pytest.raises(Ended, match=r"tokens has not the tokens that the run began with"):
        train("--resume", "run", "--train.steps", 9)
    shutil.rmtree("tokens")
    with pytest.raises(Ended, match=r"run has no folder tokens, and .*tokens is no folder of tokens"):
        train("--resume", "run", "--train.steps", 9)


@pytest.mark.parametrize("damage", ["a bit", "other bytes"])
def test_a_damaged_shard(damage, train):
    path = Path("tokens/00001.tokens")
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content if damage == "a bit" else b"\xff" * len(content))  # ids that no token has
    with pytest.raises(Ended, match=r"00001\.tokens"):
        train("tiny.toml", "--data", "tokens", "--out", "run")


def test_tokens_are_counted_where_they_are_targets(train, monkeypatch):
    counted = []
    one = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> None:
        counted.append(int((self.data.batch(self.state.items, 4)["targets"] >= 0).sum()))
        one(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    train("tiny.toml", "--data", "tokens", "--out", "run")
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if "loss" in line] == np.cumsum(counted).tolist()
