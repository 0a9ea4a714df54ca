"""Answers in the forms of /v1/chat/completions and /v1/completions, whole and in chunks."""

from __future__ import annotations

import codecs
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from ...data.tokenizer import Tokenizer
from ..request import Delta
from .bodies import Generation


@dataclass
class _Answer:
    """An answer so far."""

    text: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)  # of a chat's log-probabilities
    table: dict[str, list[Any]] = field(default_factory=dict)  # the same of a completion
    finish_reason: str | None = None
    begun: bool = False


class Answers:
    """The answers to a body, filled delta by delta."""

    def __init__(self, generation: Generation, model: str, tokenizer: Tokenizer) -> None:
        self._generation, self._tokenizer = generation, tokenizer
        self._end_ids = frozenset((*tokenizer.eos_ids, *generation.params.stop_token_ids))
        kind = "chatcmpl" if generation.chat else "cmpl"
        self._head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self._answers = [_Answer() for _ in range(generation.answers)]
        self._offsets = [_Offsets(tokenizer, *self._beginning(i)) for i in range(generation.answers)]
        self.generated_tokens = self.cached_tokens = 0
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in generation.prompts)

    def _beginning(self, i: int) -> tuple[int, int]:
        """Characters before an answer, and bytes of its first token that its text leaves out."""
        prompt = i // self._generation.params.n
        echoes = self._generation.echoes
        return len(echoes[prompt]) if echoes else 0, self._generation.prompts[prompt].skip

    # ---- whole ----

    def add(self, i: int, delta: Delta) -> dict[str, Any] | None:
        """Take a delta; returns what it adds in the API's form, None for nothing."""
        answer, generation = self._answers[i], self._generation
        self.generated_tokens += len(delta.tokens)
        if delta.finish_reason is not None:
            answer.finish_reason = delta.finish_reason
            if i % generation.params.n == 0:
                self.cached_tokens += delta.cached_tokens
        text = delta.text
        if generation.echoes is not None and not answer.begun:
            text = generation.echoes[i // generation.params.n] + text
        logprobs = self._logprobs(i, delta) if generation.logprobs else None
        begins, answer.begun = not answer.begun, True
        answer.text.append(text)
        if not (text or logprobs or begins or delta.finish_reason):
            return None
        choice: dict[str, Any] = {"index": i}
        if generation.chat:
            choice["delta"] = {"role": "assistant", "content": text} if begins else {"content": text} if text else {}
        else:
            choice["text"] = text
        return {**choice, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def whole(self) -> dict[str, Any]:
        """The answer to a body that doesn't stream."""
        choices = []
        for i, answer in enumerate(self._answers):
            text = "".join(answer.text)
            choice: dict[str, Any] = {"index": i}
            if self._generation.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                logprobs: dict[str, Any] = {"content": answer.entries, "refusal": None}
            else:
                choice["text"], logprobs = text, answer.table
            choice["logprobs"] = logprobs if self._generation.logprobs else None
            choices.append({**choice, "finish_reason": answer.finish_reason})
        kind = "chat.completion" if self._generation.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    # ---- in chunks ----

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """An event of a stream."""
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._generation.include_usage else chunk

    def last_chunk(self) -> dict[str, Any]:
        """The event with the usage, after all others."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._generation.chat else "text_completion"

    # ---- log-probabilities ----

    def _logprobs(self, i: int, delta: Delta) -> dict[str, Any] | None:
        """What a delta adds to an answer's log-probabilities, and puts into the whole answer."""
        tops = delta.top_logprobs or ((),) * len(delta.tokens)
        rows = list(zip(delta.tokens, delta.logprobs, tops, strict=True))
        if self._generation.chat:
            # The token that ends an answer is no part of a message.
            entries = [
                {**self._entry(token, logprob), "top_logprobs": [self._entry(*top) for top in most]}
                for token, logprob, most in rows
                if token not in self._end_ids or self._generation.params.ignore_eos
            ]
            self._answers[i].entries += entries
            return {"content": entries, "refusal": None} if entries else None
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, most in rows:
            table["tokens"].append(self._name(token))
            table["token_logprobs"].append(logprob)
            table["top_logprobs"].append({self._name(t): p for t, p in (*most, (token, logprob))})
            table["text_offset"].append(self._offsets[i].next(token))
        for name, values in table.items():
            self._answers[i].table.setdefault(name, []).extend(values)
        return table if rows else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    def _name(self, token: int) -> str:
        """The text of a token; of a part of a character its bytes, as OpenAI writes them."""
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class _Offsets:
    """Where the tokens of an answer begin in its text, in characters."""

    def __init__(self, tokenizer: Tokenizer, start: int, skip: int) -> None:
        self._tokenizer, self._next, self._skip = tokenizer, start, skip
        self._special = tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token: int) -> int:
        offset = self._next
        if token not in self._special:
            self._next += len(self._decoder.decode(self._tokenizer.token_bytes(token)[self._skip :]))
            self._skip = 0
        return offset
