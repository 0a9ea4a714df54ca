"""Speculative decoding: a cheap guess at the next tokens, which the model checks in one step.

The model's own choice at each place is a function of its logits and of the request's random numbers
(:func:`~fastllm.inference.sampling.sample`). A guess is kept where it is that choice, so the answer is token for token
the one without speculation. A draft model chooses with the same random numbers, which makes the two agree often
(coupling by shared Gumbel noise: Daliri et al. 2025, arXiv:2408.07978; speculative sampling: Leviathan et al. 2023,
arXiv:2211.17192).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .graphs import ReplayedGPT
from .pages import PagePool
from .request import Request
from .sampling import SamplingParams, sample
from .step import Part, decode_rows, prompt_rows, rows

LONGEST, SHORTEST = 4, 2  # latest tokens that are looked for earlier in the text
MOST_ROWS = 2048  # tokens that a draft model reads at a time


class PromptLookup:
    """Proposes what followed the latest tokens where they last stood (Saxena 2023, prompt lookup decoding)."""

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, list[int]]:
        """Up to so many tokens for each request; a request without a guess is left out."""
        found = {request: _following([*request.prompt, *request.tokens], n) for request, n in counts.items()}
        return {request: tokens for request, tokens in found.items() if tokens}


def _following(tokens: list[int], count: int) -> list[int]:
    text = array("q", tokens).tobytes()
    for size in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        latest, end = text[-8 * size :], len(text) - 8
        while (place := text.rfind(latest, 0, end)) >= 0:
            if place % 8 == 0:
                start = place // 8 + size
                return tokens[start : start + count]
            end = place + len(latest) - 1
    return []


@dataclass
class _Guess:
    """A request, with guessed tokens after its own: a row for :func:`sample`."""

    request: Request
    params: SamplingParams
    key: int
    prompt: list[int]
    tokens: list[int]

    def allowed(self, vocab_size: int) -> Tensor | None:
        return None  # what its form forbids the model does not choose


class Draft:
    """Proposes what a smaller model would choose. Its keys lie in pages of the same numbers as the model's."""

    def __init__(self, model: ReplayedGPT, pool: PagePool) -> None:
        self._model, self._page_size = model, pool.page_size

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, list[int]]:
        guesses = {r: _Guess(r, r.params, r.key, r.prompt, [*r.tokens]) for r in counts}
        if not guesses:
            return {}
        logits = self._read(list(guesses))
        left = list(counts)
        while left:
            for request, sampled in zip(left, sample(logits, [guesses[request] for request in left]), strict=True):
                if sampled is not None:
                    guesses[request].tokens.append(sampled.token)
            left = [r for r in left if len(r.tokens) < len(guesses[r].tokens) < len(r.tokens) + counts[r]]
            if left:
                logits = self._next([guesses[request] for request in left])
        return {r: guess.tokens[len(r.tokens) :] for r, guess in guesses.items() if len(guess.tokens) > len(r.tokens)}

    def _read(self, requests: list[Request]) -> Tensor:
        """Compute what is not yet of each request; the logits after its last token."""
        logits: dict[Request, Tensor] = {}
        while left := [request for request in requests if request not in logits]:
            parts: list[Part] = []
            size = 0
            for request in left:
                start = request.draft_computed
                end = min(request.length, start + MOST_ROWS - size)
                if end > start:
                    parts.append((request, start, [request.token_at(i) for i in range(start, end)]))
                    size += end - start
                    request.draft_computed = end
            ends = torch.tensor([len(tokens) for _, _, tokens in parts]).cumsum(0) - 1
            device = self._model.device
            prompts = prompt_rows(0, parts, self._page_size, device)
            out = self._model(rows(parts, ends.tolist(), [], prompts, self._page_size, device))
            for (request, start, tokens), row in zip(parts, out, strict=True):
                if start + len(tokens) == request.length:
                    logits[request] = row
        return torch.stack([logits[request] for request in requests])

    def _next(self, guesses: list[_Guess]) -> Tensor:
        """The logits after the last guess of each."""
        parts = [(g.request, len(g.prompt) + len(g.tokens) - 1, g.tokens[-1:]) for g in guesses]
        device = self._model.device
        decode = decode_rows(0, 1, [(request, start + 1) for request, start, _ in parts], device)
        return self._model(rows(parts, range(len(parts)), [decode], None, self._page_size, device))
