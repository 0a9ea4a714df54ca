"""The training step of a model: fastllm's kernels against the same model on PyTorch's own ops, eager and compiled.

    python -m benchmarks.training_step --out benchmarks/results/<device> [--preset 124m]

A step is forward, backward and AdamW on one micro-batch, in the precision that training chooses here. The four models
take turns, so that a slow moment hits all of them. Writes ``training_step.json`` into DIR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastllm.kernels.modules as modules
import fastllm.model
from benchmarks.timing import DEVICE, in_turn, stamp, write
from fastllm.config import PRESETS, Config
from fastllm.model import GPT
from fastllm.train import keep_freed_memory, make_optimizer, pick_precision, process_group, shard

ROUNDS = 30


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


def make_step(name: str, config: Config, precision: torch.dtype) -> Callable[[], None]:
    model = GPT(config.model).to(DEVICE)
    if "compile" in name:
        for layer in model.model.layers:
            layer.compile()
    model = shard(model, precision, DEVICE)
    optimizer = make_optimizer(model, config.optim)
    size = (config.train.micro_batch, config.model.context)
    tokens, targets = (torch.randint(config.model.vocab_size, size, device=DEVICE) for _ in range(2))

    def step() -> None:
        with nullcontext() if "fastllm" in name else pytorch_ops():
            model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="the model (default: %(default)s)")
    arguments = parser.parse_args()
    config = PRESETS[arguments.preset]
    precision = pick_precision("auto", DEVICE)
    if DEVICE.type == "cpu":
        keep_freed_memory()
    with process_group(DEVICE):
        steps = {n: make_step(n, config, precision) for n in ("eager", "compile", "fastllm", "fastllm+compile")}
        rows = in_turn(steps, ROUNDS, tokens=config.train.micro_batch * config.model.context)
    eager = rows[0]["seconds"]
    for row in rows:
        row |= {"times_eager": eager / row["seconds"], "tokens_per_second": row["tokens"] / row["seconds"]}
        print(f"{row['implementation']}: {row['tokens_per_second']:.0f} tokens/s, {row['times_eager']:.2f} times eager")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"stamp": stamp(), "preset": arguments.preset, "precision": str(precision), "rows": rows}
    write(arguments.out / "training_step.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
