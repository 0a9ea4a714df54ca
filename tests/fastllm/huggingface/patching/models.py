"""Small random models of transformers' families, and their training by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
EXPERTS = {"num_experts_per_tok": 4, "num_local_experts": 4}  # all: the choice of a few jumps with the rounding

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

# Configuration class, and what it is given beyond SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, rope scaled": ("LlamaConfig", {"attention_bias": True, "rope_parameters": YARN}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "phi3, part rotary": ("Phi3Config", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt2": ("GPT2Config", {**GPT2, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt-oss": ("GptOssConfig", {
        **EXPERTS, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    }),
    "llama4": ("Llama4TextConfig", {
        "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 1, "num_experts_per_tok": 1,
        "attention_chunk_size": 8, "no_rope_layers": [1, 1],
    }),
    "cohere": ("CohereConfig", {}),
}  # fmt: skip


def make(family: str, **more: Any) -> PreTrainedModel:
    """In training mode, float32, on the CPU, the same at every call; norms' weights and biases are random too."""
    name, given = FAMILIES[family]
    sizes = given if name == "GPT2Config" else {**SIZES, **given}
    config = getattr(transformers, name)(**{**sizes, **more})
    config._experts_implementation = "eager"  # the only one in float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model.train()


def some_text(batch: int = 2, seq: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Tokens and labels, some of which count nothing."""
    tokens = torch.randint(3, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, 2:5] = -100
    return {"input_ids": tokens, "labels": labels}


def loss_and_gradients(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    loss = model(**batch).loss
    used = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def trained(
    model: nn.Module,
    *,
    steps: int = 10,
    context: Callable[[], AbstractContextManager] = nullcontext,
    call: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """The loss at each step, then the parameters at the end, float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        with context():
            loss = (model if call is None else call)(**some_text(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [torch.stack(losses).double(), *(p.detach().double() for p in parameters)]


def distance(results: list[Tensor], exact: list[Tensor]) -> float:
    return sum((r.double() - e).square().sum() for r, e in zip(results, exact, strict=True)).sqrt().item()


def assert_as_near(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """The rule for numerics over all results: twice transformers' own error, plus a rounding step."""
    size = sum(e.square().sum() for e in exact).sqrt().item()
    assert distance(ours, exact) <= 2 * distance(theirs, exact) + torch.finfo(dtype).eps * size
