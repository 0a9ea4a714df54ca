"""Sampling of a token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: float = 0.8  # divides the logits; 0 takes the most likely token
    top_k: int = 50  # choose among this many most likely tokens; 0: all
    top_p: float = 1.0  # choose among the most likely tokens that reach this probability together


def sample_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A token id from ``logits`` ``[vocab_size]``."""
    if params.temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(params.top_k or len(logits), len(logits)))  # sorted
    temperature = min(max(params.temperature, 1e-30), 1e30)  # beyond, float32 would make it 0 or infinite
    probs = torch.softmax((values - values[0]) / temperature, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= params.top_p, 0.0)  # the most likely one always stays
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])
