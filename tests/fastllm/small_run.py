"""A small training run in this process and those beside it: imported by the processes that the tests start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fastllm.cli import main
from fastllm.config import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from fastllm.data.loader import IGNORE_INDEX, Batch, Sequences, TrainingData
from fastllm.data.packing import BestFit
from fastllm.data.token_data import Documents
from fastllm.distributed.gradients import full_state_dict
from fastllm.distributed.mesh import ParallelDims
from fastllm.distributed.parallelize import build_model
from fastllm.dtensor import to_full
from fastllm.training import optim
from fastllm.training.evaluation import LossEvaluator
from fastllm.training.metrics import read_log
from fastllm.training.objectives import NextTokenPrediction
from fastllm.training.signals import StopSignals
from fastllm.training.trainer import Trainer

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=259, max_seq_len=16, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, qk_norm=True, qkv_bias=True
)
# 5 sequences in micro-batches of 2: shared unevenly, with a process that has none left in a pass.
TRAIN = TrainConfig(steps=6, global_batch_tokens=80, micro_batch=2, log_every=1, eval_every=3, eval_tokens=96)
CONFIG = Config(MODEL, optim=OptimConfig(lr=2e-2), train=TRAIN, checkpoint=CheckpointConfig(every=2, keep=9))

# The [model] of runs that tests start from the command line.
TOML_MODEL = """
[model]
vocab_size = 300
max_seq_len = 32
dim = 32
layers = 1
ffn_dim = 48
"""


def config(**options: Any) -> Config:
    """``CONFIG`` with options of any section: ``tensor_parallel=2, optimizer="muon"``."""
    changed = CONFIG
    for name, value in options.items():
        section = next(s for s in ("model", "optim", "train", "spikes", "checkpoint", "parallel")
                       if hasattr(getattr(CONFIG, s), name))  # fmt: skip
        changed = replace(changed, **{section: replace(getattr(changed, section), **{name: value})})
    return changed


def some_tokens(vocab_size: int = MODEL.vocab_size) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2000).astype(np.uint16)
    tokens[1::2] = tokens[::2] // 2  # something to learn
    return tokens


class Ended(Exception):
    """A command failed, with this on stderr."""


def train_command(capsys: pytest.CaptureFixture[str], *words: object, codes: tuple[int, ...] = (0,)) -> str:
    """``fastllm train`` in this process; returns what it printed. ``codes``: exit codes that are expected."""
    capsys.readouterr()
    code = main(["train", *map(str, words)])
    printed, errors = capsys.readouterr()
    if code == 2:
        raise Ended(errors)
    assert code in codes, errors
    return printed


class RowOfTokens:
    """Tokens in memory, of documents with up to 29 of them."""

    eos_id = 0

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        lengths = np.random.default_rng(1).integers(1, 30, len(tokens))
        ends = np.minimum(np.cumsum(lengths), len(tokens))
        ends = ends[: np.searchsorted(ends, len(tokens)) + 1]
        self.documents = Documents(np.append(0, ends[:-1]), np.diff(ends, prepend=0).astype(np.uint32))

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def packed(self, seq_len: int, seed: int) -> TrainingData:
        packing = BestFit(self.documents.lengths, seq_len, seed)
        return TrainingData([Sequences(self, self.documents, packing, seq_len)], seed, None, {"tokens": "these"})


class Validation:
    """Six windows, each with the tokens of another one as its targets."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = torch.from_numpy(tokens[:96].reshape(6, 16).astype(np.int64))

    def batch(self, index: int, n: int) -> Batch:
        return {"tokens": self.tokens[index : index + n], "targets": self.tokens.flip(0)[index : index + n]}

    def padding(self) -> Batch:
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        return {"tokens": tokens, "targets": torch.full_like(tokens, IGNORE_INDEX)}


def make(config: Config, out: Path, precision: torch.dtype = torch.float32) -> Trainer:
    """A trainer at its start, within a process group."""
    out.mkdir(exist_ok=True)
    dims = ParallelDims.from_config(config.parallel, CPU.type)
    tokens, objective = some_tokens(config.model.vocab_size), NextTokenPrediction()
    return Trainer(
        config,
        dims,
        build_model(config, dims, precision, CPU),
        objective,
        RowOfTokens(tokens).packed(config.model.max_seq_len, config.train.seed),
        LossEvaluator(objective, Validation(tokens), 6, config.train.micro_batch),
        run_dir=out,
        device=CPU,
        precision=precision,
        signals=StopSignals(),
    )


def trace(config: Config, out: Path) -> dict[str, Any]:
    """Train; loss and gradient norm of each step, the last gradients, the weights, the validation loss."""
    trainer = make(config, out)
    gradients: dict[str, torch.Tensor] = {}
    update = optim.step

    def step(optimizers: Any, lr: float, grad_scale: Any = None, found_inf: Any = None) -> None:
        if grad_scale is not None and lr:
            gradients.update({name: to_full(p.grad).clone() for name, p in trainer.model.named_parameters()})
        update(optimizers, lr, grad_scale, found_inf)

    with mock.patch.object(optim, "step", step):
        trainer.run()
    curve = [(r["loss"], r["grad_norm"]) for r in read_log(out / "log.jsonl") if "loss" in r]
    return {
        "curve": torch.tensor(curve),
        "validation": torch.tensor(trainer.state.validation_loss),
        "gradients": gradients,
        "weights": full_state_dict(trainer.model),
    }


__all__ = ["CPU", "ParallelConfig", "config", "make", "trace"]
