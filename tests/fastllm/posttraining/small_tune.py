"""A small model to be tuned, chats to tune it on, and the commands that do so: for the tests of post-training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastllm import config as configs
from fastllm import run_dir
from fastllm.cli import main
from fastllm.config import Config, ModelConfig
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.gpt import GPT
from fastllm.model.weights import save_weights
from fastllm.posttraining import run
from fastllm.training import trainer
from fastllm.training.metrics import read_log

MODEL = ModelConfig(max_seq_len=128, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128)
WORDS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "gray", "gold")
ALWAYS = ("--train.log-every", 1, "--train.precision", "float32", "--data.max-seq-len", 128)


@cache
def tokenizer(chat: bool = True) -> Tokenizer:
    """Each byte is a token, and with ``chat`` those of ChatML are."""
    return Tokenizer.train(["a b"], 272 if chat else 257, chat=chat)


def small_gpt(vocab_size: int = 272, seed: int = 0, **shape: Any) -> GPT:
    """All its weights are random, those that init_weights zeroes too."""
    model = GPT(replace(MODEL, vocab_size=vocab_size, **shape), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5, generator=generator)
    return model.eval()


def save_run(folder: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """As ``fastllm train`` leaves it."""
    folder.mkdir(parents=True)
    (folder / run_dir.CONFIG).write_text(configs.dump(Config(model=model.config)))
    tokenizer.save(folder / run_dir.TOKENIZER)
    save_weights(folder / run_dir.WEIGHTS, model.state_dict(), {"tokenizer": tokenizer.fingerprint})
    run_dir.save_metadata(folder, {"status": "finished", "step": 1})
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def question(i: int) -> str:
    """Of 100, each with an answer of its own: "red 3?"."""
    return f"{WORDS[i % 10]} {i // 10}?"


def answer(i: int) -> str:
    return f"{WORDS[i % 10][::-1]} is {i // 10}"


def chats(numbers: Iterable[int]) -> list[dict[str, Any]]:
    return [{"messages": [user(question(i)), assistant(answer(i))]} for i in numbers]


def pairs(numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The rejected answer is what the chosen one should be, in capitals."""
    return [{"prompt": question(i), "chosen": answer(i), "rejected": answer(i).upper()} for i in numbers]


def tune(*words: object, code: int = 0) -> None:
    """``fastllm sft …`` or ``align …``, in this process; without the plot, and the look at how fast the machine is."""
    with mock.patch.object(run, "plot"), mock.patch.object(trainer, "peak_flops", return_value=1e12):
        assert main([*map(str, words)]) == code


def log(folder: Path, name: str) -> list[float]:
    """The values of ``name`` in the log of a run."""
    return [record[name] for record in read_log(folder / "log.jsonl") if name in record]
