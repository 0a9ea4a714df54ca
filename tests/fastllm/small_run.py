"""A small training run in this process and those beside it: imported by the processes that the tests start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastllm.config import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from fastllm.distributed.gradients import full_state
from fastllm.distributed.mesh import Layout
from fastllm.distributed.parallelize import build
from fastllm.dtensor import full
from fastllm.training import metrics as report
from fastllm.training import optim
from fastllm.training import trainer as loops
from fastllm.training.signals import StopSignals
from fastllm.training.trainer import Loop, Text

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=259, context=16, dim=32, layers=2, heads=4, kv_heads=2, hidden_dim=48, qk_norm=True, qkv_bias=True
)
# 5 sequences in micro-batches of 2: shared unevenly, with a process that has none left in a pass.
TRAIN = TrainConfig(steps=6, batch_tokens=80, micro_batch=2, log_every=1, eval_every=3, eval_tokens=96)
CONFIG = Config(MODEL, optim=OptimConfig(lr=2e-2), train=TRAIN, checkpoint=CheckpointConfig(every=2, keep=9))


def config(**options: Any) -> Config:
    """``CONFIG`` with options of any section: ``tensor=2, optimizer="muon"``."""
    changed = CONFIG
    for name, value in options.items():
        section = next(s for s in ("model", "optim", "train", "guard", "checkpoint", "parallel")
                       if hasattr(getattr(CONFIG, s), name))  # fmt: skip
        changed = replace(changed, **{section: replace(getattr(changed, section), **{name: value})})
    return changed


def text(vocab_size: int = MODEL.vocab_size) -> Text:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2000).astype(np.uint16)
    tokens[1::2] = tokens[::2] // 2  # something to learn
    inputs = tokens[:96].reshape(6, 16).astype(np.int64)
    return Text(tokens, inputs, inputs[::-1].copy())


def make(config: Config, out: Path, precision: torch.dtype = torch.float32) -> Loop:
    """A loop at its start, within a process group."""
    out.mkdir(exist_ok=True)
    layout = Layout.of(config.parallel, CPU.type)
    model = build(config, layout, precision, CPU)
    return Loop(config, layout, model, text(config.model.vocab_size), CPU, precision, out, StopSignals())


def trace(config: Config, out: Path) -> dict[str, Any]:
    """Train; loss and gradient norm of each step, the last gradients, the weights, the validation loss."""
    loop = make(config, out)
    gradients: dict[str, torch.Tensor] = {}
    update = optim.step

    def step(optimizers: Any, lr: float, divisor: Any = None, skip: Any = None) -> None:
        if divisor is not None and lr:
            gradients.update({name: full(p.grad).clone() for name, p in loop.model.named_parameters()})
        update(optimizers, lr, divisor, skip)

    with mock.patch.object(loops.optim, "step", step):
        loop.run()
    curve = [(r["loss"], r["grad_norm"]) for r in report.read_log(out / "log.jsonl") if "loss" in r]
    return {
        "curve": torch.tensor(curve),
        "validation": torch.tensor(loop.at.validation_loss),
        "gradients": gradients,
        "weights": full_state(loop.model),
    }


__all__ = ["CPU", "ParallelConfig", "config", "make", "trace"]
