"""Chat templates: the Jinja programs that make a prompt of a list of messages.

What a message says can never become a control token: the text of one in a message stays text. For that, a character
that stands nowhere else is put into each such text before the template runs, and taken out of what it wrote. So the
control tokens that are whole in its text are the template's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..input_files import one_line, read_bytes, read_json, shown
from .chat_renderer import render

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
DEPTH = 64  # of lists and objects in a message


class ChatTemplate:
    """A chat template.

    It runs in a process of its own, which the system bounds: one that loops without end, or takes too much memory, is
    an error. The process is started by the first chat and ends with this one.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None) -> None:
        """
        Args:
            source: the Jinja template.
            variables: what it sees beside the messages, such as ``bos_token`` and ``eos_token``.
        """
        self.source, self.variables = source, dict(variables or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat. For a model use :meth:`encode`, which knows what comes from a message.

        Args:
            messages: objects with a ``role`` of ROLES and a ``content``, and whatever else the template reads.
            add_generation_prompt: end with what an answer begins with.
            tools: the functions that the model may call, as JSON schemas.
            variables: that this template knows, such as ``enable_thinking``.

        Raises:
            UserError: there are no messages, one is not what it should be, or the template refuses them, fails or does
                not end.
        """
        return self._render(_given(messages, tools, variables), add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The tokens of a chat; see :meth:`render`.

        Special tokens are those that the template writes. The text of a special token in a message, a tool or a
        variable is encoded as text, also where the template joins it of several. A template that looks for such a text
        in a message does not find it. Added tokens that are not special (Qwen's ``<think>``) are part of the texts.
        """
        return self.marked(tokenizer, messages, tools=tools, **variables).encode(add_generation_prompt)

    def marked(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> MarkedChat:
        """The chat with what tells the template's control tokens from the texts of messages; see :meth:`encode`."""
        given = _given(messages, tools, variables)
        mark = next(c for c in _unused() if all(c not in text for text in (self.source, *_strings(given))))
        return MarkedChat(self, tokenizer, mark, _mapped(given, _Marker(tokenizer, mark)))

    def _render(self, given: dict[str, Any], add_generation_prompt: bool) -> str:
        fixed = {"add_generation_prompt": add_generation_prompt, "documents": None}
        return render(self.source, {**fixed, **self.variables, **given})


class MarkedChat:
    """A chat whose texts are marked: a special token that is whole in what the template makes of it is its own."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, mark: str, given: dict[str, Any]) -> None:
        self.template, self.tokenizer, self.mark, self.given = template, tokenizer, mark, given

    def render(self, messages: int | None = None, *, add_generation_prompt: bool = False) -> str:
        """The marked text of the first ``messages`` (None: all)."""
        given = {**self.given, "messages": self.given["messages"][:messages]}
        return self.template._render(given, add_generation_prompt)

    def plain(self, text: str) -> str:
        """A marked text without its marks."""
        return text.replace(self.mark, "")

    def ids(self, text: str) -> list[int]:
        """The tokens of a marked text."""
        ids: list[int] = []
        for part in self.tokenizer.split_special(text):
            ids += [part] if isinstance(part, int) else _as_text(self.tokenizer, part, self.mark)
        return ids

    def encode(self, add_generation_prompt: bool) -> list[int]:
        """The tokens of the whole chat."""
        return self.ids(self.render(add_generation_prompt=add_generation_prompt))


def _given(messages: Any, tools: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """What the caller gives to a template, checked, as plain JSON."""
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages must be a list, it is {shown(messages)}")
    if not messages:
        raise UserError("messages is empty: a chat has at least one message")
    plain = []
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{name} must be an object with a role and a content, it is {shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{name}.role must be one of {', '.join(ROLES)}, it is {shown(role)}")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            raise UserError(f"{name}.content must be a text or a list of parts, it is {shown(content)}")
        # As transformers has it: a key without a value is not there.
        plain.append(_plain({key: value for key, value in message.items() if value is not None}, name))
    return {"messages": plain, "tools": _plain(tools, "tools"), **_plain(variables, "variables")}


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """``value`` if it is made of what JSON has."""
    if depth > DEPTH:
        raise UserError(f"{name.split('.')[0]} is nested more than {DEPTH} deep")
    if isinstance(value, str):
        if not _is_unicode(value):
            raise UserError(f"{name} is not valid Unicode text: it has half a surrogate pair")
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and _is_unicode(key) for key in value):
        return {key: _plain(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
    raise UserError(f"{one_line(name)} must be made of texts, numbers, lists and objects, it is {shown(value)}")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)


def _mapped(value: Any, function: Callable[[str], str], key: str = "") -> Any:
    """``value`` with all its texts replaced, but for the roles, which are checked."""
    if isinstance(value, str):
        return value if key == "role" else function(value)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {function(key): _mapped(item, function, key) for key, item in value.items()}
    return value


def _unused() -> Iterator[str]:
    """Characters that no text should have: noncharacters, and after them those of private use."""
    yield from map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))


class _Marker:
    """Puts a mark into each special token in a text, so that it is none any more.

    Marked are also the beginnings of special tokens at the end of a text, and their ends at its start: a template may
    put texts side by side. Upper and lower case count as the same, because a template may change them.
    """

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        self.mark = mark
        tokens = sorted({token.lower() for token in tokenizer.special_tokens})
        self.whole = re.compile("|".join(f"(?={re.escape(token)})" for token in tokens) or "(?!)", re.IGNORECASE)
        self.starts = {token[:n] for token in tokens for n in range(1, len(token))}
        self.ends = {token[n:] for token in tokens for n in range(1, len(token))}
        self.longest = max(map(len, tokens), default=0)
        self.single = {token for token in tokens if len(token) == 1}

    def __call__(self, text: str) -> str:
        lower = text.lower()
        if any(token in lower for token in self.single):
            raise UserError(f"the text {shown(text)} has a special token of one character, which can't be plain text")
        places = {found.start() + 1 for found in self.whole.finditer(text)}
        for n in range(1, min(self.longest, len(text) + 1)):
            if text[-n:].lower() in self.starts:
                places.add(len(text) - n + 1)
            if text[:n].lower() in self.ends:
                places.add(n - 1)
        for place in sorted(places, reverse=True):
            text = text[:place] + self.mark + text[place:]
        return text


def _as_text(tokenizer: Tokenizer, marked: str, mark: str) -> list[int]:
    """The ids of a text without its marks, none of which is special."""
    special, text = tokenizer.special_ids, marked.replace(mark, "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not special.isdisjoint(ids):  # merges make one of plain text, but not of its parts
        ids = [i for part in marked.split(mark) for i in tokenizer.encode(part, add_special_tokens=False)]
    if not special.isdisjoint(ids):
        raise UserError(f"the tokenizer makes a special token of the text {shown(text)}")
    return ids


def read_chat_template(folder: Path, variables: Mapping[str, str] | None = None) -> ChatTemplate | None:
    """The chat template of a Hugging Face folder or a run folder; None where it has none.

    ``variables``: special tokens that it sees, unless the folder names others. The template is in chat_template.jinja,
    or in older folders in chat_template.json or tokenizer_config.json.
    """
    older, config = (read_json(folder / name) if os.path.lexists(folder / name) else {} for name in (SPECIAL, CONFIG))
    source: Any = None
    if os.path.lexists(folder / TEMPLATE):
        path, content = folder / TEMPLATE, read_bytes(folder / TEMPLATE)
        try:
            source = content.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None
    elif os.path.lexists(folder / OLDER_TEMPLATE):
        path, source = folder / OLDER_TEMPLATE, read_json(folder / OLDER_TEMPLATE).get("chat_template")
    else:
        path, source = folder / CONFIG, config.get("chat_template")
    if isinstance(source, list):  # several with names
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        if "default" not in named:
            raise UserError(f"{path}: chat_template has no template of the name default")
        source = named["default"]
    if source is None:
        return None
    if not isinstance(source, str):
        raise UserError(f"{path}: chat_template must be a text, it is {shown(source)}")
    return ChatTemplate(source, {**(variables or {}), **_special_texts({**older, **config})})


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a folder's files name, by their keys."""
    texts: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[key] = value
    return texts
