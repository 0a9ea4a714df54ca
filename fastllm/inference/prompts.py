"""Prompts as the model reads them: texts and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from .request import Prompt


def text_prompt(tokenizer: Tokenizer, text: str, *, heal: bool = True) -> Prompt:
    """The tokens of a text; of an empty one the token that begins a text.

    With ``heal`` (token healing) a final space is taken off, because tokens begin with their space, and the first new
    token is one that begins with a space and is longer. Not where the form of the answer is given: it is that of what
    follows the text.
    """
    ids = encode_text(tokenizer, text) or [tokenizer.eos_id]
    if heal and len(ids) > 1 and tokenizer.token_bytes(ids[-1]) == b" ":
        allowed = tokenizer.with_prefix(b" ")
        if allowed:
            return Prompt(ids[:-1], allowed, 1)
    return Prompt(ids)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text; UserError where it is not Unicode."""
    try:
        return tokenizer.encode(text)
    except TypeError:  # a lone surrogate, which Python makes of bytes that are not UTF-8
        raise UserError("the prompt is not valid UTF-8 text") from None


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A conversation, ready for the model's answer.

    Raises:
        UserError: the model has no chat template, or the template doesn't take the messages.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError("the model has no chat template: it was not trained to chat")
    return Prompt(template.encode(tokenizer, messages, add_generation_prompt=True))
