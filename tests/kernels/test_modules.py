"""The modules take the state dict of what they stand for, and compute what that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from fastllm.kernels import CausalSelfAttention, CrossEntropyLoss, LinearCrossEntropyLoss, RMSNorm, SwiGLU, use_backend
from tests.numerics import assert_accurate, with_gradients

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

NORMS = {
    "torch": (lambda: nn.RMSNorm(64, eps=1e-5), lambda: RMSNorm(64, 1e-5)),
    "torch, no weight": (
        lambda: nn.RMSNorm(64, eps=1e-5, elementwise_affine=False),
        lambda: RMSNorm(64, 1e-5, elementwise_affine=False),
    ),
    "llama": (lambda: LlamaRMSNorm(64, 1e-5), lambda: RMSNorm(64, 1e-5)),
    "gemma": (lambda: GemmaRMSNorm(64, 1e-5), lambda: RMSNorm(64, 1e-5, weight_offset=1.0)),
}
MLPS = {
    bias: (
        lambda b=bias: LlamaMLP(LlamaConfig(**SIZES, intermediate_size=96, mlp_bias=b)),
        lambda b=bias: SwiGLU(64, 96, bias=b),
    )
    for bias in (False, True)
}
ATTENTIONS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "llama": (LlamaAttention, LlamaConfig(**SIZES), {}),
    "mistral": (MistralAttention, MistralConfig(**SIZES, sliding_window=5), {"window": 5}),
    "qwen2": (Qwen2Attention, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}), {"bias": True}),
    "qwen3": (Qwen3Attention, Qwen3Config(**SIZES), {"qk_norm": True}),
}


def random_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return module


def assert_stands_for(ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Loads the state dict, strictly; output and gradient as near to float64 as those of ``theirs``."""
    ours.load_state_dict(random_weights(theirs).state_dict(), strict=True)
    x, g = torch.randn(2, 12, 64), torch.randn(2, 12, 64)
    results = [with_gradients(lambda x, m=module: call(m, x), [x], [g]) for module in (ours, theirs)]
    with use_backend("torch"):
        exact = with_gradients(lambda x: call(ours.double(), x), [x.double()], [g.double()])
    for mine, eager, reference in zip(*results, exact, strict=True):
        assert_accurate(mine, eager, reference)


@pytest.mark.parametrize("name", NORMS)
def test_rms_norm(name):
    theirs, ours = NORMS[name]
    assert_stands_for(ours(), theirs(), lambda module, x: module(x))


@pytest.mark.parametrize("bias", MLPS)
def test_mlp(bias):
    theirs, ours = MLPS[bias]
    assert_stands_for(ours(), theirs(), lambda module, x: module(x))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    kind, config, options = ATTENTIONS[name]
    config._attn_implementation = "eager"
    theirs, ours = kind(config, 0), CausalSelfAttention(64, 4, 2, 16, eps=1e-6, **options)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.zeros(1), torch.arange(12).unsqueeze(0))
    at = torch.arange(12)
    seen = (at <= at[:, None]) & (at > at[:, None] - options.get("window", 12))

    def call(module: nn.Module, x: Tensor) -> Tensor:
        if module is ours:
            return module(x, *(t[0, :, :8].to(x.dtype) for t in (cos, sin)))
        mask = torch.zeros(12, 12).masked_fill(~seen, -torch.inf).expand(2, 1, 12, 12)
        return module(x, position_embeddings=(cos, sin), attention_mask=mask)[0]

    assert_stands_for(ours, theirs, call)


def test_losses():
    logits, target, weight = torch.randn(7, 64), torch.arange(7), torch.rand(64)
    theirs = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    ours = CrossEntropyLoss(torch.zeros(64), label_smoothing=0.1)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    head = nn.Linear(64, 50, bias=True)
    fused = LinearCrossEntropyLoss(64, 50, bias=True)
    fused.linear.load_state_dict(head.state_dict())
    torch.testing.assert_close(fused(logits, target), nn.functional.cross_entropy(head(logits), target))
