"""The engine: many requests at once on one model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from ..data.progress import progress as progress_bar
from ..data.tokenizer import Tokenizer
from ..errors import UserError, did_you_mean
from ..hardware import host_memory
from ..model.gpt import GPT
from .graphs import ReplayedGPT
from .paged_gpt import PagedGPT
from .pages import PagePool
from .prompts import chat_prompt, text_prompt
from .request import Completion, Delta, Prompt, Request, make_requests
from .sampling import SamplingParams, sample
from .speculation import Draft, PromptLookup
from .step import rows_of
from .structured import GrammarCompiler

Message = Mapping[str, Any]  # "role", "content"


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and what it does now."""

    running: int
    waiting: int
    pages: int
    free_pages: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    proposed_tokens: int
    accepted_tokens: int


class Engine:
    """Answers requests by continuous batching (Yu et al. 2022, Orca): they join and leave between steps.

    A step takes one token (with speculation several) of each running answer, and parts of waiting prompts beside
    them. Keys and values lie in one pool of pages; a request begins when all pages that it may need are free, so that
    none ever runs out of memory. Prompts that begin alike share pages.

    On a CPU a request's tokens and log-probabilities depend on nothing but the request, bit by bit: not on others in
    the batch, not on what is cached, not on speculation. An engine is for one thread; servers use
    :class:`~fastllm.inference.async_engine.AsyncEngine`.

    Args:
        model: its weights are copied, packed, as they are now (see :meth:`update_weights`).
        tokenizer: of the model.
        max_batch: requests that run at once.
        max_seq_len: tokens of prompt and answer; None: what the model sees and the pool holds.
        kv_tokens: tokens in the pool; None: enough for max_batch whole sequences, or what half of the free memory
            holds.
        page_size: tokens of a page.
        chunk: tokens of prompts that a step computes beside answers, which wait for it; four times as many where
            there are none.
        quantize: "int8" for 8-bit weights with a scale for each row; None: the model's dtype.
        speculate: tokens that a draft proposes in a step; the model keeps those that it would have chosen itself.
        draft: a smaller model with the same tokenizer, or "prompt" to propose what followed the latest tokens
            earlier in the text.

    Raises:
        UserError: the tokenizer or the draft is not the model's, or the pool doesn't fit into memory.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 32,
        max_seq_len: int | None = None,
        kv_tokens: int | None = None,
        page_size: int = 16,
        chunk: int = 512,
        quantize: Literal["int8"] | None = None,
        speculate: int = 0,
        draft: GPT | Literal["prompt"] = "prompt",
    ) -> None:
        for name, value in (("max_batch", max_batch), ("page_size", page_size), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, it is {value}")
        self.tokenizer, self.max_batch, self.chunk, self.speculate = tokenizer, max_batch, chunk, speculate
        self.vocab_size = model.config.vocab_size
        longest = min(model.config.max_seq_len, max_seq_len or model.config.max_seq_len)
        pages = _pool_pages(model, max_batch, longest, kv_tokens, page_size)
        self.max_seq_len = min(longest, pages * page_size)
        self.pool = PagePool(pages, page_size)
        self._quantize: Literal["int8"] | None = quantize
        self._model = self._packed(model)
        self._drafter: Draft | PromptLookup | None = None
        if speculate and isinstance(draft, GPT):
            if draft.config.vocab_size != self.vocab_size:
                raise UserError(f"the draft has {draft.config.vocab_size} tokens, the model {self.vocab_size}")
            self._drafter = Draft(self._packed(draft), self.pool)
        elif speculate:
            self._drafter = PromptLookup()
        self.grammars = GrammarCompiler(tokenizer, self.vocab_size)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._counts = dict.fromkeys(("prompt", "cached", "generated", "proposed", "accepted"), 0)

    # ---- whole answers ----

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: texts, or lists of token ids.
            params: how; see :class:`SamplingParams`.
            progress: show a bar.
            options: fields of SamplingParams, in place of ``params`` or of some of its fields.

        Returns:
            The completions in the order of the prompts, ``n`` of each.

        Raises:
            UserError: a prompt is longer than the context, a parameter is wrong, or the logits are not finite.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text: pass a list of texts")
        chosen = _params(params, options)
        return self._complete([self.prompt(p, chosen) for p in prompts], chosen, progress)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Answer each conversation, a list of messages with "role" and "content", by the model's chat template."""
        prompts = [chat_prompt(self.tokenizer, messages) for messages in conversations]
        return self._complete(prompts, _params(params, options), progress)

    def stream(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Delta]:
        """Continue a prompt; yields what each step adds. The request ends where the iterator is closed."""
        chosen = replace(_params(params, options), n=1)
        (request,) = self.add(self.prompt(prompt, chosen), chosen)
        try:
            while request.finish_reason is None:
                self.step()
                delta = request.take()
                if delta.text or delta.tokens or delta.finish_reason:
                    if delta.finish_reason == "error":
                        request.completion()  # raises
                    yield delta
        finally:
            self.cancel(request)

    def prompt(self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None) -> Prompt:
        """The tokens of a prompt; of an empty one the token that begins a text."""
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            return text_prompt(self.tokenizer, prompt, heal=params is None or params.grammar is None)
        return Prompt(list(prompt) or [self.tokenizer.eos_id])

    def _complete(self, prompts: list[Prompt], params: SamplingParams, progress: bool) -> list[Completion]:
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests += self.add(prompt, params)
            left = list(requests)
            with progress_bar("generate", len(requests)) if progress else nullcontext() as bar:
                while left:
                    self.step()
                    before, left = len(left), [request for request in left if request.finish_reason is None]
                    if bar is not None:
                        bar.advance(before - len(left))
        finally:
            for request in requests:
                self.cancel(request)
        return [request.completion() for request in requests]

    # ---- step by step ----

    def add(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """Queue the ``params.n`` requests of a prompt."""
        matchers = [None if params.grammar is None else self.grammars.matcher(params.grammar) for _ in range(params.n)]
        requests = make_requests(prompt, params, self.tokenizer, self.vocab_size, self.max_seq_len, matchers)
        # The last token is always computed: its logits give the first of the answer.
        keys = self.pool.keys(prompt.tokens[:-1])
        for request in requests:
            request.page_keys = keys
        self._waiting.extend(requests)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request and free its pages at once; nothing where it has ended."""
        if request.finish_reason is None:
            request.end("cancelled")
        if request in self._running:
            self._running.remove(request)
            self._leave(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def stats(self) -> EngineStats:
        counts = {f"{name}_tokens": count for name, count in self._counts.items()}
        return EngineStats(len(self._running), len(self._waiting), self.pool.pages, self.pool.free, **counts)

    def update_weights(self, model: GPT) -> None:
        """Take the weights of ``model``, of the same shape, for all that follows; no request may be running."""
        if self.busy:
            raise UserError("update_weights: there are requests that run or wait")
        if model.config != self._model.config:
            raise UserError("update_weights: the model is of another configuration")
        self.pool = PagePool(self.pool.pages, self.pool.page_size)  # the keys of known prompts are of the old weights
        self._model = self._packed(model)

    def _packed(self, model: GPT) -> ReplayedGPT:
        packed = PagedGPT(model, self.pool.pages, self.pool.page_size, self.max_seq_len, self._quantize)
        return ReplayedGPT(packed, self.max_seq_len)

    def step(self) -> list[Request]:
        """Compute the next tokens of all running requests; returns those whose answers grew or ended."""
        self._admit()
        if not self._running:
            return []
        proposals = self._propose()
        chunk = self.chunk if any(request.tokens for request in self._running) else 4 * self.chunk
        batch = rows_of(self._running, proposals, chunk, self.pool.page_size, self._model.device)
        logits = self._model(batch.rows)
        for request, computed in batch.prompt_parts:
            self._computed(request, computed)
        self._choose(logits, batch.answering, proposals)
        for request in batch.answering:
            if request.finish_reason is not None:
                self._running.remove(request)
                self._leave(request)
        return batch.answering

    def _choose(self, logits: torch.Tensor, answering: list[Request], proposals: Mapping[Request, list[int]]) -> None:
        """Append tokens. A proposal is right where the model chooses the same: then the next row of logits holds."""
        start = 0
        left: list[tuple[Request, int, list[int]]] = []  # with the first of its rows
        for request in answering:
            proposed = proposals.get(request, [])
            left.append((request, start, proposed))
            start += 1 + len(proposed)
        place = 0
        while left:
            rows = logits if len(left) == len(logits) else logits[[start + place for _, start, _ in left]]
            right = []
            for (request, start, proposed), sampled in zip(
                left, sample(rows, [request for request, _, _ in left]), strict=True
            ):
                request.computed = request.length
                request.add(sampled)
                self._counts["generated"] += sampled is not None
                if request.finish_reason is None and place < len(proposed) and request.tokens[-1] == proposed[place]:
                    self._counts["accepted"] += 1
                    right.append((request, start, proposed))
            left, place = right, place + 1

    def _propose(self) -> dict[Request, list[int]]:
        if self._drafter is None:
            return {}
        # A last token needs no proposal after it, and proposals have no pages beyond the request's.
        counts = {
            request: min(self.speculate, request.limit - request.length - 1)
            for request in self._running
            if request.tokens
        }
        proposals = self._drafter.propose({request: n for request, n in counts.items() if n > 0})
        self._counts["proposed"] += sum(map(len, proposals.values()))
        return proposals

    def _admit(self) -> None:
        """Begin waiting requests, first come, first served, while there is room for all that they may need."""
        if not self._waiting:
            return
        size = self.pool.page_size
        computing = {key for request in self._running for key in request.page_keys[request.computed // size :]}
        for request in [*self._waiting]:
            if len(self._running) >= self.max_batch:
                return
            unknown = next((key for key in request.page_keys if not self.pool.knows(key)), None)
            if unknown in computing:
                continue  # another request computes the same: it is known in a moment
            pages = self.pool.acquire(request.limit, request.page_keys)
            if pages is None:
                return
            self._waiting.remove(request)
            request.pages, known = pages
            request.computed = request.cached = known * size
            request.table = torch.tensor(request.pages, dtype=torch.int32)
            request.began = time.monotonic()
            self._running.append(request)
            self._counts["prompt"] += len(request.prompt)
            self._counts["cached"] += request.cached
            computing.update(request.page_keys[known:])

    def _computed(self, request: Request, computed: int) -> None:
        """Keys and values of a prompt are in the pool up to ``computed``."""
        size = self.pool.page_size
        for i in range(request.computed // size, min(computed // size, len(request.page_keys))):
            self.pool.remember(request.page_keys[i], request.pages[i])
        request.computed = computed

    def _leave(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.table = [], None


def _params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    unknown = sorted(options.keys() - {f.name for f in fields(SamplingParams)})
    if unknown:
        names = [f.name for f in fields(SamplingParams)]
        raise UserError(f"there is no parameter {unknown[0]!r}{did_you_mean(unknown[0], names)}")
    return replace(params or SamplingParams(), **options)


def _pool_pages(model: GPT, max_batch: int, max_seq_len: int, kv_tokens: int | None, page_size: int) -> int:
    """Pages of the pool: as many as are asked for, else as max_batch whole sequences need and memory holds."""
    if kv_tokens is not None and kv_tokens < page_size:
        raise UserError(f"kv_tokens must be at least a page of {page_size} tokens, it is {kv_tokens}")
    config, weight = model.config, model.head_weight
    bytes_of_token = 2 * config.layers * config.kv_heads * config.head_dim * weight.element_size()
    memory = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else host_memory()
    if kv_tokens is not None:
        if kv_tokens * bytes_of_token > memory:
            raise UserError(
                f"kv_tokens is {kv_tokens:,}, of {bytes_of_token:,} bytes each; there are {memory:,} bytes of memory"
            )
        return kv_tokens // page_size
    wanted = max_batch * -(-max_seq_len // page_size)
    share = memory // 2 if weight.is_cuda else memory // 4
    return max(1, min(wanted, share // (bytes_of_token * page_size)))
