"""Sampling a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token, from ``logits`` ``[vocab_size]``; temperature 0: the likeliest; top_k 0: no limit."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))  # sorted
    probs = torch.softmax(values / temperature, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the likeliest always stays
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])
