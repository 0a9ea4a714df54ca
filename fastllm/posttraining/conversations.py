"""Chats, preference pairs and prompts, in the forms that people keep them in, as lists of messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..data.chat_template import ROLES
from ..input_files import shown
from .rendering import Refused
from .rows import Report, Row, read_rows

T = TypeVar("T")
Message = dict[str, Any]

# Why a row is dropped.
UNRECOGNISED, NO_TURNS, MALFORMED = "no form that is known", "no turns", "malformed turn"
UNKNOWN_ROLE, NO_TEXT, EMPTY_ANSWER = "unknown role", "turn without a text", "empty assistant turn"
SAME_ROLE, LATE_SYSTEM, NO_USER = "consecutive turns of one role", "system turn that is not first", "no user turn first"
NO_ANSWER, EQUAL_SIDES, EMPTY_SIDE = "no assistant turn", "equal sides", "empty side"
NOT_AN_ANSWER, NO_PROMPT = "side that is no assistant turn", "prompt that does not end with a user turn"
BAD_LABEL = "label that is not true or false"
# What is changed in a row that is kept.
CUT_END = "turns after the last answer are left out"

SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "ipython")


@dataclass(frozen=True)
class Conversation:
    """A chat. ``where``: its place in the data."""

    messages: list[Message]
    tools: list[Any] | None
    where: str


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt, of which ``chosen`` is preferred."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None
    where: str


@dataclass(frozen=True)
class Judged:
    """An answer that is desirable or not."""

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    tools: list[Any] | None
    where: str


@dataclass(frozen=True)
class Prompt:
    """A chat that ends with a user turn, and the other columns of its row."""

    messages: list[Message]
    where: str
    row: dict[str, Any] = field(default_factory=dict)


def read_conversations(path: str | Path, report: Report) -> Iterator[Conversation]:
    """The chats of a file or folder: rows with ``messages``, ShareGPT's ``conversations``, Alpaca's ``instruction``
    and ``output``, or ``prompt`` and ``completion``. Others are dropped, with their reason, into ``report``."""
    return _kept(path, report, lambda row: [_conversation(row, report)])


def read_pairs(path: str | Path, report: Report) -> Iterator[Pair]:
    """The pairs of a file or folder: rows with ``prompt``, ``chosen`` and ``rejected``, each a text or messages; or
    with ``chosen`` and ``rejected`` alone, two chats that begin alike."""
    return _kept(path, report, lambda row: [_pair(row)])


def read_judged(path: str | Path, report: Report) -> Iterator[Judged]:
    """The answers of a file or folder: rows with ``prompt``, ``completion`` and ``label`` (true: desirable), or the two
    sides of pairs."""
    return _kept(path, report, _judged)


def read_prompts(path: str | Path, report: Report) -> Iterator[Prompt]:
    """The prompts of a file or folder: rows with ``prompt`` (a text or messages), ``messages``, ``question`` or
    ``instruction``; an answer at the end of messages is left out. All other keys are the prompt's ``row``."""
    return _kept(path, report, lambda row: [_prompt(row)])


def _kept(path: str | Path, report: Report, make: Callable[[Row], list[T]]) -> Iterator[T]:
    for row in read_rows(path, report):
        try:
            yield from make(row)
        except Refused as refusal:
            report.drop(row.where, refusal.reason, refusal.detail)


# ---- rows ----


def _conversation(row: Row, report: Report) -> Conversation:
    messages = _checked(_system_first(row.values, _turns(row.values)))
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise Refused(NO_ANSWER)
    if last < len(messages) - 1:
        report.note(row.where, CUT_END)
    return Conversation(messages[: last + 1], _tools(row.values), row.where)


def _turns(values: Mapping[str, Any]) -> list[Any]:
    """The turns of a row, whatever its form, not checked."""
    if "messages" in values:
        return _list_of(values["messages"], "messages")
    if "conversations" in values:
        return [*map(_sharegpt, _list_of(values["conversations"], "conversations"))]
    if "conversation" in values:
        return [*map(_sharegpt, _list_of(values["conversation"], "conversation"))]
    if "instruction" in values and "output" in values:
        return [*_alpaca_prompt(values), {"role": "assistant", "content": values["output"]}]
    if "prompt" in values and "completion" in values:
        return [*_as_messages(values["prompt"], "user"), *_as_messages(values["completion"], "assistant")]
    raise Refused(UNRECOGNISED, f"its keys are {', '.join(map(str, list(values)[:6])) or 'none'}")


def _list_of(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # of tables that keep JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused(MALFORMED, f"{name} is a text") from None
    if not isinstance(value, list):
        raise Refused(MALFORMED, f"{name} is {shown(value)}")
    return value


def _sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    name = turn["from"]
    role = SHAREGPT.get(name.lower(), name) if isinstance(name, str) else name
    message: Message = {"role": role, "content": turn.get("value")}
    if name == "function_call":
        calls = _parsed_call(turn.get("value"))
        if calls:
            message = {"role": role, "content": "", "tool_calls": calls}
    return message | ({"weight": turn["weight"]} if "weight" in turn else {})


def _parsed_call(value: Any) -> list[Any] | None:
    try:
        parsed = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        return None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _alpaca_prompt(values: Mapping[str, Any]) -> list[Any]:
    before: list[Any] = []
    for pair in values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(MALFORMED, f"history has {shown(pair)}, not a question and an answer")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    text, more = values["instruction"], values.get("input")
    if isinstance(text, str) and isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}" if text.strip() else more
    return [*before, {"role": "user", "content": text}]


def _as_messages(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else _list_of(value, "prompt" if role == "user" else "answer")


def _system_first(values: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    system = values.get("system")
    if not isinstance(system, str) or not system.strip():
        return turns
    if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def _tools(values: Mapping[str, Any]) -> list[Any] | None:
    tools = values.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise Refused(MALFORMED, "tools is not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused(MALFORMED, f"tools is {shown(tools)}, not a list of objects")
    return tools or None


def _pair(row: Row) -> Pair:
    values = row.values
    missing = [name for name in ("chosen", "rejected") if name not in values]
    if missing:
        raise Refused(UNRECOGNISED, f"it has no {' and no '.join(missing)}")
    sides = [_as_messages(values[name], "assistant") for name in ("chosen", "rejected")]
    if "prompt" in values or "question" in values or "instruction" in values:
        prompt = _prompt_turns(values)
        if all(isinstance(side, list) and side[: len(prompt)] == prompt and len(side) > len(prompt) for side in sides):
            sides = [side[len(prompt) :] for side in sides]  # whole chats
    else:
        same = 0
        while all(same < len(side) - 1 for side in sides) and sides[0][same] == sides[1][same]:
            same += 1
        prompt, sides = sides[0][:same], [side[same:] for side in sides]
    prompt = _checked_prompt(_system_first(values, prompt))
    answers = [_checked_answer(prompt, side) for side in sides]
    if answers[0] == answers[1]:
        raise Refused(EQUAL_SIDES)
    return Pair(prompt, *answers, _tools(values), row.where)


def _judged(row: Row) -> list[Judged]:
    values = row.values
    if "chosen" in values:
        pair = _pair(row)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return [Judged(pair.prompt, answer, good, pair.tools, row.where) for answer, good in sides]
    if "completion" not in values or "label" not in values:
        raise Refused(UNRECOGNISED, f"its keys are {', '.join(map(str, list(values)[:6])) or 'none'}")
    if type(values["label"]) is not bool:
        raise Refused(BAD_LABEL, shown(values["label"]))
    prompt = _checked_prompt(_system_first(values, _prompt_turns(values)))
    answer = _checked_answer(prompt, _as_messages(values["completion"], "assistant"))
    return [Judged(prompt, answer, values["label"], _tools(values), row.where)]


def _prompt(row: Row) -> Prompt:
    values = row.values
    turns = _prompt_turns(values)
    if turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    used = ("prompt", "messages", "question", "instruction", "input", "system")
    name = next(name for name in used if name in values)
    taken = {name, "system"} | ({"input", "history"} if name == "instruction" else set())
    others = {key: value for key, value in values.items() if key not in taken}
    return Prompt(_checked_prompt(_system_first(values, turns)), row.where, others)


def _prompt_turns(values: Mapping[str, Any]) -> list[Any]:
    for name in ("prompt", "messages", "question"):
        if name in values:
            return _as_messages(values[name], "user")
    if "instruction" in values:
        return _alpaca_prompt(values)
    raise Refused(UNRECOGNISED, f"its keys are {', '.join(map(str, list(values)[:6])) or 'none'}")


# ---- checks ----


def _checked_prompt(turns: Sequence[Any]) -> list[Message]:
    messages = _checked(turns)
    if messages[-1]["role"] == "assistant" or messages[-1]["role"] == "system":
        raise Refused(NO_PROMPT, f"it ends with the {messages[-1]['role']}")
    return messages


def _checked_answer(prompt: list[Message], side: list[Any]) -> list[Message]:
    if not side:
        raise Refused(EMPTY_SIDE)
    first = side[0]
    if not isinstance(first, dict) or first.get("role") != "assistant":
        raise Refused(NOT_AN_ANSWER, shown(first))
    try:
        messages = _checked([*prompt, *side])[len(prompt) :]
    except Refused as refusal:
        raise Refused(EMPTY_SIDE if refusal.reason == EMPTY_ANSWER else refusal.reason, refusal.detail) from None
    if messages[-1]["role"] != "assistant":
        raise Refused(NOT_AN_ANSWER, f"it ends with the {messages[-1]['role']}")
    return messages


def _checked(turns: Sequence[Any]) -> list[Message]:
    """The turns of a chat, without keys that have no value. Raises Refused where it is none."""
    if not turns:
        raise Refused(NO_TURNS)
    messages: list[Message] = []
    before = ""
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Refused(MALFORMED, shown(turn))
        message = {key: value for key, value in turn.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(UNKNOWN_ROLE, shown(role))
        _check_content(message, f"turn {number + 1}")
        if role in ("system", "developer"):
            if number:
                raise Refused(LATE_SYSTEM, f"turn {number + 1}")
        elif role == before and role not in TOOL_ROLES:
            raise Refused(SAME_ROLE, f"turns {number} and {number + 1} are the {role}'s")
        elif role != "user" and before in ("", "system", "developer"):
            raise Refused(NO_USER, f"the {role} begins")
        messages.append(message)
        before = role
    if before in ("system", "developer"):
        raise Refused(NO_USER, "there is only a system turn")
    return messages


def _check_content(message: Message, where: str) -> None:
    content, is_answer = message.get("content"), message["role"] == "assistant"
    calls = message.get("tool_calls")
    if calls is not None and not (is_answer and isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        raise Refused(MALFORMED, f"{where}: tool_calls is {shown(calls)}")
    if isinstance(content, list):
        parts = all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)
        if not parts:
            raise Refused(NO_TEXT, f"{where} has parts that are no text")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise Refused(NO_TEXT, f"{where} has {shown(content)}")
    if not calls and (content is None or not content.strip()):
        if is_answer:
            raise Refused(EMPTY_ANSWER, where)
        if content is None:
            raise Refused(NO_TEXT, where)
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise Refused(MALFORMED, f"{where}: weight is {shown(weight)}, not 0 or 1")
