"""Rotary tables, with the numbers of well-known models, against transformers and Python's own cosine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastllm.config import ModelConfig
from fastllm.model.rope import attention_factor, rotary_tables

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "theta", "factor", "original", "more"),
    [
        ("linear", 10_000.0, 8.0, 2048, {}),
        ("llama3", 500_000.0, 8.0, 8192, LLAMA3),  # Llama 3.1
        ("llama3", 500_000.0, 32.0, 8192, LLAMA3),  # Llama 3.2
        ("yarn", 10_000.0, 16.0, 4096, {}),  # Llama 2, stretched to 64k
        ("yarn", 1_000_000.0, 4.0, 32_768, {}),  # Qwen2.5 and Qwen3
    ],
)
def test_frequencies(kind: str, theta: float, factor: float, original: int, more: dict[str, Any]) -> None:
    own = ModelConfig(
        max_seq_len=2, dim=256, rope_theta=theta, rope_scaling=kind, rope_factor=factor,
        rope_original_max_seq_len=0 if kind == "linear" else original,
    )  # fmt: skip
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor, **more}
    theirs = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=original,
        rope_parameters=rope | ({} if kind == "linear" else {"original_max_position_embeddings": original}),
    )  # fmt: skip
    expected, size = ROPE_INIT_FUNCTIONS[kind](theirs)
    assert attention_factor(own) == pytest.approx(size, rel=1e-12)
    cos, sin = rotary_tables(own)
    torch.testing.assert_close(torch.hypot(cos, sin), torch.full_like(cos, size), rtol=1e-6, atol=0)
    steps = math.log(theta) + 3  # that transformers' powers in float32 may be off by, and a few for the rest
    torch.testing.assert_close(torch.atan2(sin[1], cos[1]), expected, rtol=steps * torch.finfo().eps, atol=0)


def test_angles_far_from_the_start() -> None:
    """They are as exact there as near it: float32 angles would be off by 0.004."""
    cos, sin = rotary_tables(ModelConfig(max_seq_len=100_000, dim=32, heads=2))
    for pair in range(8):
        angle = 99_999 * 10_000.0 ** (-pair / 8)
        for table, exact in ((cos, math.cos(angle)), (sin, math.sin(angle))):
            assert abs(table[-1, pair].item() - exact) <= 2**-24
