"""Text generation with a key/value cache."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..input_files import shown
from ..model.gpt import GPT
from ..model.kv_cache import KVCache
from .sampling import SamplingParams, sample_token


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
    """Continue ``prompt``; yields text as it is generated.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        prompt: the text to continue; the model sees its last ``max_seq_len`` tokens.
        max_tokens: stop after this many tokens, if the model does not end the text before.
        temperature, top_k, top_p: see :class:`SamplingParams`.
        seed: the same seed gives the same text.

    Raises:
        UserError: the prompt is not valid Unicode text, the tokenizer is not the model's, or the logits are not finite.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed must be from 0 to 2**64 - 1, it is {shown(seed)}")
    ids = encode_prompt(tokenizer, prompt) or [tokenizer.eos_id]
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    params = SamplingParams(temperature, top_k, top_p)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, allowed = heal_prompt(tokenizer, ids)
    skip = 0 if allowed is None else 1  # the space that the prompt has already
    for token in generate_tokens(model, ids, max_tokens, params, generator, first_token=allowed):
        if token in tokenizer.eos_ids:
            break
        text, skip = tokenizer.token_bytes(token)[skip:], 0
        yield decoder.decode(text)
    yield decoder.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except TypeError:  # a lone surrogate, which Python makes of bytes that are not UTF-8
        raise UserError("the prompt is not valid UTF-8 text") from None


def heal_prompt(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int] | None]:
    """Token healing: take a final space off the prompt, because tokens begin with their space.

    Returns the shorter prompt and the tokens from which the first one is chosen: those that begin with a space and are
    longer. Where there are none, or no final space, the prompt as it is and None.
    """
    if len(ids) > 1 and tokenizer.token_bytes(ids[-1]) == b" ":
        allowed = tokens_with_prefix(tokenizer, b" ")
        if allowed:
            return ids[:-1], allowed
    return ids, None


def tokens_with_prefix(tokenizer: Tokenizer, prefix: bytes) -> list[int]:
    """The tokens that begin with ``prefix`` and are longer."""
    tokens = range(tokenizer.vocab_size)
    return [t for t in tokens if (b := tokenizer.token_bytes(t)).startswith(prefix) and len(b) > len(prefix)]


@torch.no_grad()
def generate_tokens(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    params: SamplingParams,
    generator: torch.Generator,
    first_token: list[int] | None = None,
) -> Iterator[int]:
    """Up to ``max_tokens`` token ids after ``ids``; the first is one of ``first_token`` (None: any)."""
    max_seq_len, vocab_size, device = model.config.max_seq_len, model.config.vocab_size, model.head_weight.device
    wrong = [token for token in (*ids, *(first_token or ())) if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"the tokenizer is not the model's: token {wrong[0]} is not one of its {vocab_size}")
    new = ids[-max_seq_len:]
    size = min(max_seq_len, len(new) + max_tokens)
    cache = KVCache(model, size=size)
    for _ in range(max_tokens):
        if cache.length + len(new) > size:  # full: continue with the latest half
            cache, new = KVCache(model), ids[-max(max_seq_len // 2, 1) :]
        logits = model.next_logits(torch.tensor([new], device=device), cache)[0].float()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
        if first_token is not None:
            mask = torch.full_like(logits, float("-inf"))
            mask[first_token] = 0.0
            logits, first_token = logits + mask, None
        token = sample_token(logits, params, generator)
        ids, new = [*ids[-max_seq_len:], token], [token]
        yield token
