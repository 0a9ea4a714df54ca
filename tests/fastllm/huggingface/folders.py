"""Small random models of transformers, and whether a GPT computes the same."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastllm.data.tokenizer import Tokenizer
from fastllm.model.gpt import GPT
from tests.numerics import assert_accurate

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0,
    "rms_norm_eps": 0.01,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 24}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Configuration class, and what it is given beyond SIZES.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "llama, with keys of the others": (
        "Llama",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
}
TOKENS = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], 300)


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Every weight counts, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model.eval()


def their_model(name: str, **more: Any) -> PreTrainedModel:
    kind, given = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **given, **more})
    return randomised(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def assert_same_logits(gpt: GPT, model: PreTrainedModel) -> None:
    """The GPT's error against float64 is at most twice that of transformers, plus a rounding step.

    The reference is the GPT, once it is seen to be transformers' model, whose norms and angles are float32 even in
    float64.
    """
    tokens = TOKENS % gpt.config.vocab_size
    logits, eager = gpt(tokens), model(tokens).logits
    exact = gpt.double()(tokens)
    torch.testing.assert_close(model.double()(tokens).logits, exact, rtol=1e-4, atol=1e-4)
    assert_accurate(logits, eager, exact)
