"""Answers of a given form: a JSON schema or a regular expression, by llguidance (extra ``serve``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..errors import ParameterError, pip_install, require_packages
from ..input_files import one_line

if TYPE_CHECKING:
    import llguidance

MOST_CHARACTERS = 2**18  # of a schema or an expression


@dataclass(frozen=True)
class Grammar:
    """The form of an answer; made by :func:`json_schema` and :func:`regex`."""

    source: str  # as llguidance reads it


def json_schema(schema: Mapping[str, Any] | bool) -> Grammar:
    """Answers that are JSON of this schema. ParameterError where it can't be enforced."""
    return _grammar("json_schema", json.dumps(schema))


def regex(pattern: str) -> Grammar:
    """Answers that this regular expression (Rust's syntax, without look-around) matches as a whole."""
    return _grammar("regex", pattern)


JSON_OBJECT: dict[str, Any] = {"type": "object"}


def _grammar(kind: str, text: str) -> Grammar:
    require_packages("an answer of a given form", "llguidance", install=pip_install("serve"))
    from llguidance import LLMatcher

    if len(text) > MOST_CHARACTERS:
        raise ParameterError("response_format", f"the {kind} is longer than {MOST_CHARACTERS:,} characters")
    try:
        source = getattr(LLMatcher, f"grammar_from_{kind}")(text)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(source)
    except ValueError as error:
        wrong, messages = True, [str(error)]
    if wrong:
        raise ParameterError("response_format", f"the {kind} can't be used: {one_line(messages[0])}")
    return Grammar(source)


class GrammarCompiler:
    """Makes the matchers of a model's tokenizer, which takes a second the first time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._known: llguidance.LLTokenizer | None = None

    def prepare(self) -> llguidance.LLTokenizer:
        """What the first matcher would wait for."""
        import llguidance

        if self._known is None:
            text = self._tokenizer.backend.to_str()
            eos = list(self._tokenizer.eos_ids)
            self._known = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos)
        return self._known

    def matcher(self, grammar: Grammar) -> Matcher:
        import llguidance

        matcher = llguidance.LLMatcher(self.prepare(), grammar.source, log_level=0)
        if matcher.is_error():
            raise ParameterError("response_format", f"it can't be used: {one_line(matcher.get_error())}")
        return Matcher(matcher)


class Matcher:
    """Where a request stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """bool ``[vocab_size]``: the tokens that may come next, those that end the text included."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=vocab_size).view(np.bool_))

    def consume(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def stopped(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped()
