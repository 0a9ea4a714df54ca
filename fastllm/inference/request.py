"""A request to the engine, from its prompt to its end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..errors import ParameterError, UserError
from .sampling import Sampled, SamplingParams
from .structured import Matcher
from .text_stream import TextStream

# stop: the model, a stop text or a stop token ended it; length: max_tokens or the end of the context;
# cancelled: somebody did; error: the model's logits were not finite.
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer; the last one has a finish_reason."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # of the prompt, as in Completion
    queued: float = 0.0  # seconds before the request began


@dataclass(frozen=True)
class Completion:
    """An answer.

    ``tokens`` has the token that ended the answer, if one did; ``text`` has not. ``logprobs`` are those of the model
    for the tokens, in nats, before temperature and penalties; ``top_logprobs`` the most likely tokens at each place
    with theirs, where asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt: their keys and values were known from another request


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue. ``first``: the tokens from which the first one is chosen (None: all), without ``skip`` bytes
    of its text, which the prompt has already."""

    tokens: list[int]
    first: tuple[int, ...] | None = None
    skip: int = 0


@dataclass(eq=False)
class Request:
    """The engine's account of a request. ``computed`` of its tokens have their keys and values in ``pages``."""

    prompt: list[int]
    params: SamplingParams
    key: int  # of its random numbers
    limit: int  # tokens at which it ends, those of the prompt included
    stop_ids: frozenset[int]
    stream: TextStream
    first: tuple[int, ...] | None = None
    matcher: Matcher | None = None
    page_keys: Sequence[bytes] = ()  # of the prompt's full pages
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    pages: list[int] = field(default_factory=list)
    table: Tensor | None = None  # pages as int32
    computed: int = 0
    draft_computed: int = 0  # the same of the draft model
    cached: int = 0
    arrived: float = field(default_factory=time.monotonic)
    began: float = 0.0
    _taken: int = 0  # tokens and
    _shown: int = 0  # characters that were handed out

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    def token_at(self, place: int) -> int:
        return self.prompt[place] if place < len(self.prompt) else self.tokens[place - len(self.prompt)]

    def allowed(self, vocab_size: int) -> Tensor | None:
        if self.matcher is not None:
            return self.matcher.allowed(vocab_size)
        if self.first is None or self.tokens:
            return None
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[list(self.first)] = True
        return allowed

    def add(self, sampled: Sampled | None) -> None:
        """Append a token, and end the answer where it says so."""
        if sampled is None:
            self.end("error")
            return
        self.tokens.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        if self.params.logprobs is not None:
            self.top_logprobs.append(sampled.top)
        if sampled.token in self.stop_ids:
            self.end("stop")
            return
        if self.matcher is not None:
            self.matcher.consume(sampled.token)
        _, stopped = self.stream.add(sampled.token)
        if stopped or (self.matcher is not None and self.matcher.stopped):
            self.end("stop")
        elif self.length >= self.limit:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        self.stream.finish()
        self.finish_reason = reason

    def take(self) -> Delta:
        """What is new since the last time."""
        start, self._taken = self._taken, len(self.tokens)
        text, self._shown = self.stream.text[self._shown :], len(self.stream.text)
        tops = tuple(self.top_logprobs[start:])
        return Delta(
            text, tuple(self.tokens[start:]), tuple(self.logprobs[start:]), tops, self.finish_reason, self.cached,
            self.began - self.arrived,
        )  # fmt: skip

    def completion(self) -> Completion:
        if self.finish_reason == "error":
            raise UserError(NOT_FINITE)
        assert self.finish_reason is not None
        return Completion(
            self.stream.text, self.tokens, self.logprobs, self.top_logprobs, self.finish_reason, len(self.prompt),
            self.cached,
        )  # fmt: skip


NOT_FINITE = "the model's logits are not finite: its weights are damaged, or its training diverged"


def make_requests(
    prompt: Prompt,
    params: SamplingParams,
    tokenizer: Tokenizer,
    vocab_size: int,
    max_seq_len: int,
    matchers: Sequence[Matcher | None],
) -> list[Request]:
    """A request for each of the matchers. UserError for tokens or lengths that the model can't take."""
    outside = [token for token in (*prompt.tokens, *(prompt.first or ())) if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"the tokenizer is not the model's: token {outside[0]} is not one of its {vocab_size}")
    outside = [token for token in (*params.logit_bias, *params.stop_token_ids) if not 0 <= token < vocab_size]
    if outside:
        name = "logit_bias" if outside[0] in params.logit_bias else "stop_token_ids"
        raise ParameterError(name, f"{name} has token {outside[0]}, the model's are 0 to {vocab_size - 1}")
    length = len(prompt.tokens)
    if length >= max_seq_len:
        room = f"the context is {max_seq_len:,} tokens, the answer included"
        raise ParameterError("prompt", f"the prompt has {length:,} tokens; {room}")
    limit = min(max_seq_len, length + (params.max_tokens or max_seq_len))
    ends = () if params.ignore_eos else tokenizer.eos_ids
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return [
        Request(
            list(prompt.tokens), params, (seed + i) % 2**64, limit, frozenset((*ends, *params.stop_token_ids)),
            TextStream(tokenizer, params.stop, prompt.skip), prompt.first, matcher,
        )
        for i, matcher in enumerate(matchers)
    ]  # fmt: skip
