"""The training step of the default model: fastllm's kernels against the same model on PyTorch's own ops.

A step is forward, backward and AdamW on one micro-batch, in the precision that training chooses here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastllm.kernels.modules as modules
import fastllm.model
from benchmarks.timing import DEVICE
from fastllm.config import Config
from fastllm.model import GPT
from fastllm.train import keep_freed_memory, make_optimizer, pick_precision, process_group, shard


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None, weight_offset: float) -> Any:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.shape[-1],), weight, eps)
    return y if residual is None else (y, h)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    cos, sin = (t[: q.shape[1]].to(q.dtype).repeat(1, 2).unsqueeze(1) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), target.flatten())


@contextmanager
def pytorch_ops() -> Iterator[None]:
    with ExitStack() as stack:
        for op in (rms_norm, rope, flash_attention, swiglu):
            stack.enter_context(mock.patch.object(modules, op.__name__, op))
        stack.enter_context(mock.patch.object(fastllm.model, "linear_cross_entropy", linear_cross_entropy))
        yield


@pytest.mark.parametrize("name", ["eager", "compile", "fastllm", "fastllm+compile"])
def test_training_step(measure: Any, name: str) -> None:
    torch._dynamo.reset()
    if DEVICE.type == "cpu":
        keep_freed_memory()
    config = Config()
    precision = pick_precision("auto", DEVICE)
    with ExitStack() as stack:
        stack.enter_context(process_group(DEVICE))
        if "fastllm" not in name:
            stack.enter_context(pytorch_ops())
        model = GPT(config.model).to(DEVICE)
        if "compile" in name:
            for layer in model.model.layers:
                layer.compile()
        model = shard(model, precision, DEVICE)
        optimizer = make_optimizer(model, config.optim)
        size = (config.train.micro_batch, config.model.context)
        tokens, targets = (torch.randint(config.model.vocab_size, size, device=DEVICE) for _ in range(2))

        def step() -> None:
            model(tokens, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        case = f"training step, default model, {str(precision).removeprefix('torch.')}"
        measure(step, case=case, implementation=name, rounds=20, amount=tokens.numel(), unit="tokens/s")
