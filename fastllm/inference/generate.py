"""Text from a trained model: sampling with a key/value cache."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.gpt import GPT
from ..model.kv_cache import KVCache
from .sampling import pick


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The text that follows ``prompt``, piece by piece, until the model ends it or ``max_tokens`` are made.

    Text longer than the model's context is cropped from the left.
    """
    try:
        ids = tokenizer.encode(prompt) or [tokenizer.end]
    except TypeError:  # a lone surrogate: what Python makes of bytes that are no UTF-8
        raise UserError("the prompt is not valid UTF-8 text") from None
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, begun = unfinished(tokenizer, ids)
    for token in sample(model, ids, max_tokens, allowed(tokenizer, begun), temperature, top_k, top_p, generator):
        if token in tokenizer.ends:
            break
        piece, begun = tokenizer.token_bytes(token)[len(begun) :], b""
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def unfinished(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], bytes]:
    """Take a last space off a prompt: tokens begin with their space, so the model has to choose it again."""
    last = tokenizer.token_bytes(ids[-1])
    return (ids[:-1], last) if len(ids) > 1 and last == b" " else (ids, b"")


def allowed(tokenizer: Tokenizer, prefix: bytes) -> list[int] | None:
    """The tokens that begin with ``prefix`` and go on; None: all."""
    if not prefix:
        return None
    tokens = range(tokenizer.vocab_size)
    return [t for t in tokens if (b := tokenizer.token_bytes(t)).startswith(prefix) and len(b) > len(prefix)]


@torch.no_grad()
def sample(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    first: list[int] | None,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Up to ``max_tokens`` tokens that follow ``ids``; ``first`` limits the choice of the first."""
    context, device = model.config.context, model.head_weight.device
    new = ids[-context:]
    size = min(context, len(new) + max_tokens)
    cache = KVCache(model, size=size)
    for _ in range(max_tokens):
        if cache.length + len(new) > size:  # full: go on with the latest half
            cache, new = KVCache(model), ids[-max(context // 2, 1) :]
        logits = model.next_logits(torch.tensor([new], device=device), cache)[0].float()
        if first is not None:
            mask = torch.full_like(logits, float("-inf"))
            mask[first] = 0.0
            logits, first = logits + mask, None
        token = pick(logits, temperature, top_k, top_p, generator)
        ids, new = [*ids[-context:], token], [token]
        yield token
