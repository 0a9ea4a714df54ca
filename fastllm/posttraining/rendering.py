"""Chats as tokens, and which of them the model learns: its own turns, with the token that ends each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.chat_template import ChatTemplate, MarkedChat
from ..data.tokenizer import END_OF_TURN, Tokenizer
from ..errors import UserError
from ..input_files import one_line

# Of a model without one: ChatML.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_TOKENS = ("<|im_start|>", END_OF_TURN)

# Why a chat is not trained on.
FAILS, DROPS = "the chat template fails", "the chat template drops a turn"
MOVES = "the chat template writes the answer after another prompt than it generates from"
ENDLESS = "the chat template writes no token that ends the answer"
TOO_LONG, CUT_ANSWER = "the prompt leaves no room for an answer", "the answer is cut off by the context"
UNTRAINED = "no turn is to be trained on"


class Refused(Exception):
    """A chat can't be trained on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Encoded(NamedTuple):
    """Tokens, int32, and whether each is learnt, bool; the last one is. ``cut``: later turns did not fit."""

    ids: np.ndarray
    trained: np.ndarray
    cut: bool = False


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    max_tokens: int,
    first: int = 0,
) -> list[Encoded]:
    """The tokens of a chat, learnt where they are the assistant's turns from message ``first`` on.

    Each answer begins where the template's prompt for it ends, and is encoded apart from it, as in generation. It ends
    with the first token that ends generation. Turns with ``weight`` 0 are not learnt.

    Args:
        max_tokens: a longer chat ends with the last answer that fits.

    Returns:
        One sequence; or one for each answer, where the template writes earlier turns otherwise than it generated them
        (Qwen3 leaves out their thoughts).

    Raises:
        Refused: the chat can't be trained on.
    """
    assert tokenizer.chat_template is not None
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    learnt = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    learnt = [i for i in learnt if messages[i].get("weight", 1)]
    if not learnt:
        raise Refused(UNTRAINED)
    try:
        chat = tokenizer.chat_template.marked(tokenizer, plain, tools=tools)
        prompts = {i: chat.render(i, add_generation_prompt=True) for i in learnt}
        whole = chat.render()
        if _as_generated(chat, whole, prompts):
            return [_sequence(chat, whole, prompts, max_tokens)]
        found: list[Encoded] = []
        for i, prompt in prompts.items():
            text = chat.render(i + 1)
            if not text.startswith(prompt):
                raise Refused(MOVES)
            try:
                found.append(_sequence(chat, text, {i: prompt}, max_tokens))
            except Refused as refusal:
                if not found or refusal.reason not in (TOO_LONG, CUT_ANSWER):
                    raise
                found[-1] = found[-1]._replace(cut=True)
                break
        return found
    except UserError as error:
        raise Refused(FAILS, one_line(error)) from None


def _as_generated(chat: MarkedChat, whole: str, prompts: Mapping[int, str]) -> bool:
    """Whether the whole chat has each answer after its prompt and as it was when it was the last turn."""
    for i, prompt in prompts.items():
        text = chat.render(i + 1)
        if not text.startswith(prompt):
            return False
        if not whole.startswith(text[: _end_of_turn(chat.tokenizer, text, len(prompt), len(text))]):
            return False
    return True


def _sequence(chat: MarkedChat, text: str, prompts: Mapping[int, str], max_tokens: int) -> Encoded:
    """The marked ``text`` of a chat in which the answers of messages ``prompts`` follow on these prompts."""
    _check_turns(chat, text, max(prompts))
    starts = [*map(len, prompts.values()), len(text)]
    ids: list[int] = []
    trained: list[bool] = []
    end = kept = 0
    cut = False
    for i, start, limit in zip(prompts, starts, starts[1:], strict=False):
        stop = _end_of_turn(chat.tokenizer, text, start, limit)
        _check_answer(chat, i, text[start:stop])
        prompt, answer = chat.ids(text[end:start]), chat.ids(text[start:stop])
        end = stop
        if len(ids) + len(prompt) + len(answer) > max_tokens:
            cut = True
            if not kept:
                raise Refused(TOO_LONG if len(prompt) >= max_tokens else CUT_ANSWER, f"{max_tokens:,} tokens")
            break
        ids += prompt + answer
        trained += [False] * len(prompt) + [True] * len(answer)
        kept = len(ids)
    return Encoded(np.array(ids, np.int32), np.array(trained, bool), cut)


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int, limit: int) -> int:
    """Where the answer that starts at ``start`` ends: behind the first token that ends generation."""
    for names in (_texts(tokenizer, tokenizer.eos_ids), tokenizer.special_tokens):
        found = re.compile("|".join(map(re.escape, names)) or "(?!)").search(text, start, limit)
        if found:
            return found.end()
    raise Refused(ENDLESS)


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [text for text in map(tokenizer.backend.id_to_token, ids) if text]


def _check_turns(chat: MarkedChat, text: str, last: int) -> None:
    """Raise Refused where a turn's text before the last answer is not in the chat's."""
    shown, end = chat.plain(text), 0
    for message in chat.given["messages"][:last]:
        if message["role"] not in ("system", "user"):
            continue  # of tools templates make other text, of answers see below
        content = chat.plain(_content(message)).strip()
        place = shown.find(content, end if message["role"] == "user" else 0)
        if place < 0:
            raise Refused(DROPS, f"the {message['role']} turn {one_line(content)[:40]!r}")
        end = max(end, place + len(content)) if message["role"] == "user" else end


def _check_answer(chat: MarkedChat, i: int, text: str) -> None:
    """Raise Refused where the template left out what the answer says."""
    said = _said(chat, i).rpartition("</think>")[2].strip()  # templates write thoughts in their own way
    if said not in chat.plain(text):
        raise Refused(DROPS, f"the answer {one_line(said)[:40]!r}")


def _said(chat: MarkedChat, i: int) -> str:
    return chat.plain(_content(chat.given["messages"][i])).strip()


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def prepare_template(tokenizer: Tokenizer, source: str | None = None) -> tuple[str, ...]:
    """Give ``tokenizer`` the chat template ``source``, or :data:`DEFAULT_TEMPLATE` where it has none, and let the token
    that ends an answer end generation.

    Returns:
        Special tokens that the template needs and the tokenizer lacks.
    """
    eos = tokenizer.backend.id_to_token(tokenizer.eos_id) or ""
    if source is not None:
        before = {} if tokenizer.chat_template is None else tokenizer.chat_template.variables
        tokenizer.chat_template = ChatTemplate(source, {"bos_token": eos, "eos_token": eos, **before})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ChatTemplate(DEFAULT_TEMPLATE, {"bos_token": eos, "eos_token": eos})
    if tokenizer.chat_template.source != DEFAULT_TEMPLATE:
        return ()
    return tuple(token for token in DEFAULT_TOKENS if token not in tokenizer.special_tokens)


def learn_end_of_turn(tokenizer: Tokenizer) -> None:
    """Let the special token that the chat template writes after an answer end generation too."""
    assert tokenizer.chat_template is not None
    probe = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "the answer"}]
    try:
        text = tokenizer.chat_template.render(probe, add_generation_prompt=False)
    except UserError:
        return  # each chat will say so
    _, said, after = text.rpartition("the answer")
    if not said:
        return  # nor is each chat's
    special = next((part for part in tokenizer.split_special(after) if isinstance(part, int)), None)
    if special is not None and special not in tokenizer.eos_ids:
        tokenizer.eos_ids = (*tokenizer.eos_ids, special)
