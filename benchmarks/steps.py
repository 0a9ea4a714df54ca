"""Whole training steps: forward, backward and AdamW.

The ladder: the GPT from plain PyTorch to all of our kernels, one change a row, and torch.compile on both ends. And a
Hugging Face Llama, as it is and patched. In the precision that training chooses here; FSDP2 as in training.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastllm
import fastllm.kernels.modules as modules
from fastllm.config import Config, ParallelConfig
from fastllm.distributed.mesh import ParallelDims
from fastllm.distributed.parallelize import parallelize
from fastllm.model import gpt
from fastllm.model.gpt import GPT
from fastllm.planning.presets import PRESETS
from fastllm.training.optim import make_optimizers
from fastllm.training.optim import step as update
from fastllm.training.pretrain import pick_precision

from .attention import sdpa
from .cases import COMPILED, DROP_IN, LADDER, OURS, PYTORCH, Call, Case, Scale, short
from .pointwise import eager_rope, eager_swiglu
from .timing import DEVICE


def cases(scale: Scale) -> Iterator[Case]:
    yield _ladder(scale.pick("124m", "default", "default"))
    if importlib.util.find_spec("transformers"):
        yield _transformers(scale)


# ---- the same model on PyTorch's own ops ----


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None, weight_offset: float) -> Any:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.shape[-1],), weight, eps)
    return y if residual is None else (y, h)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    return eager_rope(q, k, *(t[: q.shape[1]].to(q.dtype).repeat(1, 2).unsqueeze(1) for t in (cos, sin)))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, reduction: str) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), target.flatten(), reduction=reduction)


# Our op -> where the model finds it, and PyTorch's in its place; in the order in which the ladder brings them in.
IN_PLACE: dict[str, tuple[Any, Callable]] = {
    "rms_norm": (modules, rms_norm),
    "rope": (modules, rope),
    "swiglu": (modules, eager_swiglu),
    "flash_attention": (modules, flash_attention),
    "linear_cross_entropy": (gpt, linear_cross_entropy),
}


@contextmanager
def only(brought_in: tuple[str, ...]) -> Iterator[None]:
    """PyTorch's ops for all but these."""
    with ExitStack() as stack:
        for name, (place, op) in IN_PLACE.items():
            if name not in brought_in:
                stack.enter_context(mock.patch.object(place, name, op))
        yield


def _step(
    model: nn.Module, config: Config, loss: Callable[[], Tensor], within: Callable[[], AbstractContextManager]
) -> Call:
    optimizers = make_optimizers(model, config.optim)

    def step() -> None:
        with within():
            loss().backward()
        update(optimizers, config.optim.lr)

    return step


# ---- the ladder ----


def _rungs() -> dict[str, tuple[str, ...]]:
    names = tuple(IN_PLACE)
    rungs = {PYTORCH: (), f"{PYTORCH}, {COMPILED}": ()}
    rungs |= {f"{OURS}: {'+ ' * (n > 0)}{name}": names[: n + 1] for n, name in enumerate(names)}
    return rungs | {f"{OURS}, {COMPILED}": names}


def _ladder(preset: str) -> Case:
    config, precision = PRESETS[preset], pick_precision("auto", DEVICE)
    size = (config.train.micro_batch, config.model.max_seq_len)

    def call(rung: str) -> Call:
        model = GPT(config.model).to(DEVICE)
        parallel = ParallelConfig(compile=COMPILED in rung)
        parallelize(model, parallel, ParallelDims.from_config(parallel, DEVICE.type), precision)
        tokens, targets = (torch.randint(config.model.vocab_size, size, device=DEVICE) for _ in range(2))
        return _step(model, config, lambda: model(tokens, targets), lambda: only(_rungs()[rung]))

    return Case(
        LADDER, f"{preset} model, {size[0]}×{size[1]}", "step", short(precision),
        size[0] * size[1], "tokens/s", tuple(_rungs()), lambda: {rung: call(rung) for rung in _rungs()},
    )  # fmt: skip


# ---- somebody else's model ----


def _transformers(scale: Scale) -> Case:
    """A Llama of transformers on random weights, in bfloat16 autocast on a GPU and float32 on a CPU."""
    dim, hidden, layers, vocab, batch, seq = scale.pick(
        (2048, 5632, 4, 128256, 4, 1024), (384, 1024, 6, 32000, 2, 512), (256, 768, 2, 16000, 1, 256)
    )
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    names = ("transformers", f"transformers, {COMPILED}", f"transformers, {OURS}", f"transformers, {OURS}, {COMPILED}")

    def call(name: str) -> Call:
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = {"num_attention_heads": dim // 64, "num_key_value_heads": max(1, dim // 256)}
        sizes = {"vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(DEVICE).train()
        if OURS in name:
            fastllm.patch(model)
        run: Any = torch.compile(model) if COMPILED in name else model
        tokens = torch.randint(vocab, (batch, seq), device=DEVICE)
        within = partial(torch.autocast, DEVICE.type, dtype, enabled=dtype != torch.float32)
        return _step(model, Config(), lambda: run(input_ids=tokens, labels=tokens, use_cache=False).loss, within)

    size = f"Llama of transformers, {layers} layers of {dim}, {batch}×{seq}"
    return Case(
        DROP_IN, size, "step", short(dtype), batch * seq, "tokens/s", names, lambda: {n: call(n) for n in names}
    )  # fmt: skip
