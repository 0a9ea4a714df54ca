"""Conversations, pairs of answers, judged answers and prompts, in the forms that data sets have.

All have the same messages: ``role`` is system, user, assistant or tool, ``content`` a text. An assistant's turn may
have ``tool_calls`` whose arguments are objects, and any turn a ``weight``. Other keys are kept if they have a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..input_files import one_line, shown
from .rendering import Refused
from .rows import Report, Row, parse_json, read_rows

Message = dict[str, Any]
T = TypeVar("T")

TURNS = ("messages", "conversations", "conversation")  # keys of a list of messages
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response"), "tool"),
}

# Why a row is dropped.
UNRECOGNISED, NO_TURNS, BAD_MESSAGE = "row of no known form", "no turns", "message is not an object"
UNKNOWN_ROLE, NO_TEXT, EMPTY_ANSWER = "unknown role", "content is missing or not text", "empty assistant turn"
REPEATED, LATE_SYSTEM, BAD_START = "two turns of one role", "system turn not first", "first turn is not the user's"
NO_ANSWER, BAD_WEIGHT = "no assistant turn", "weight is not 0 or 1"
BAD_CALLS, BAD_TOOLS, BAD_HISTORY = "malformed tool call", "malformed tools", "malformed history"
NO_PROMPT, PROMPT_END = "no prompt", "prompt does not end with a user turn"
EMPTY_SIDE, EQUAL_SIDES = "empty side", "equal sides"
NOT_ANSWER, OTHER_PROMPT = "side is not an assistant turn", "side has another prompt"
BAD_LABEL = "label is not true or false"
# Notes.
ENDS_WITH_USER, ENDS_WITH_TOOL = "ends with a user turn: cut", "ends with a tool turn: cut"


class Conversation(NamedTuple):
    """It ends with an assistant's turn. Turns of ``weight`` 0 are not to be learnt."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str


class Pair(NamedTuple):
    """Two answers to a prompt. Each is one or more turns, the first and the last of them the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None
    where: str


class Judged(NamedTuple):
    """An answer, and whether it is a good one."""

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    tools: list[dict[str, Any]] | None
    where: str


class Prompt(NamedTuple):
    """A prompt; ``row``: the other columns, such as the right answer."""

    messages: list[Message]
    row: dict[str, Any]
    where: str
    tools: list[dict[str, Any]] | None = None


def read_conversations(path: str | Path, report: Report) -> Iterator[Conversation]:
    """The conversations of a file or a folder; see :func:`.rows.read_rows`. What is dropped goes to ``report``.

    A row is one of:

    - ``messages`` (OpenAI): ``role``, ``content``, which is a text or a list of parts that are texts, ``tool_calls``;
    - ``conversations`` (ShareGPT): ``from``, ``value``;
    - ``instruction``, ``output`` (Alpaca), perhaps ``input`` and ``history``, a list of ``[user, assistant]``;
    - ``prompt``, ``completion``: texts or messages. The assistant's turns in the prompt get the weight 0.

    Each may have ``system``, a text, and ``tools``, a list of objects or the JSON text of one.

    Raises:
        UserError: a file can't be read.
    """
    return _read(path, report, partial(_conversation, report))


def read_pairs(path: str | Path, report: Report) -> Iterator[Pair]:
    """Rows with ``chosen`` and ``rejected``: texts, messages, or whole conversations that begin alike.

    ``prompt`` is a text or messages. Where both sides are whole conversations, the prompt is all that they have in
    common; ``prompt`` may then be absent, and must otherwise be part of it.
    """
    return _read(path, report, lambda row: [_pair(row)])


def read_judged(path: str | Path, report: Report) -> Iterator[Judged]:
    """Rows with ``prompt``, ``completion`` and ``label`` (KTO), and those of :func:`read_pairs`, which become two."""
    return _read(path, report, _judged)


def read_prompts(path: str | Path, report: Report) -> Iterator[Prompt]:
    """Rows with ``prompt`` (a text or messages), ``messages``, ``question`` (GSM8K) or ``instruction`` (Alpaca).

    An assistant's turn at the end of ``messages`` is left out. The other keys become the prompt's ``row``.
    """
    return _read(path, report, _prompt)


def _read(path: str | Path, report: Report, parse: Callable[[Row], Sequence[T]]) -> Iterator[T]:
    for row in read_rows(path, report):
        try:
            found = parse(row)
        except Refused as refusal:
            report.drop(row.where, refusal.reason, refusal.detail)
        else:
            report.read += len(found) - 1  # each is kept, or dropped later, on its own
            yield from found


# ---- rows ----


def _present(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.values.items() if value is not None}


def _unrecognised(row: Row) -> Refused:
    keys = ", ".join([*map(one_line, list(row.values)[:10]), *(["…"] if len(row.values) > 10 else [])])
    return Refused(UNRECOGNISED, f"its keys are {keys}" if keys else "it has no keys")


def _conversation(report: Report, row: Row) -> list[Conversation]:
    values = _present(row)
    if key := next((key for key in TURNS if key in values), ""):
        messages = _messages(values[key])
    elif "prompt" in values and "completion" in values:
        prompt = _asked(_messages(values["prompt"], "user"))
        for message in prompt:
            if message["role"] == "assistant":
                message.setdefault("weight", 0)
        messages = prompt + _answered(values["completion"])
    elif "instruction" in values and "output" in values:
        messages = _asked(_alpaca(values)) + _answered(values["output"])
    else:
        raise _unrecognised(row)
    messages = _with_system(values, messages)
    _check_turns(messages)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise Refused(NO_ANSWER)
    found = Conversation(messages[: last + 1], _tools(values), row.where)
    if last + 1 < len(messages):
        report.note(row.where, ENDS_WITH_USER if messages[-1]["role"] == "user" else ENDS_WITH_TOOL)
    return [found]


def _pair(row: Row) -> Pair:
    values = _present(row)
    if not {"chosen", "rejected"} & values.keys():
        raise _unrecognised(row)
    prompt, (chosen, rejected) = _prompt_and_sides(values, "chosen", "rejected")
    return Pair(prompt, chosen, rejected, _tools(values), row.where)


def _judged(row: Row) -> list[Judged]:
    values = _present(row)
    if {"chosen", "rejected"} & values.keys():
        pair = _pair(row)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return [Judged(pair.prompt, answer, good, pair.tools, row.where) for answer, good in sides]
    if "completion" not in values:
        raise _unrecognised(row)
    label = values.get("label")
    if not isinstance(label, bool):
        raise Refused(BAD_LABEL, shown(label))
    prompt, (answer,) = _prompt_and_sides(values, "completion")
    return [Judged(prompt, answer, label, _tools(values), row.where)]


def _prompt(row: Row) -> list[Prompt]:
    values = _present(row)
    key = next((key for key in ("prompt", *TURNS, "question", "instruction") if key in values), "")
    if not key:
        raise _unrecognised(row)
    used = {key, "system", "tools"}
    if key == "instruction":
        messages = _alpaca(values)
        used |= {"input", "history"}
    else:
        messages = _messages(values[key], None if key in TURNS else "user")
    if key in TURNS and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    _check_prompt(messages)
    messages = _with_system(values, messages)
    _check_turns(messages)
    other = {key: value for key, value in row.values.items() if key not in used}
    return [Prompt(messages, other, row.where, _tools(values))]


def _alpaca(values: dict[str, Any]) -> list[Message]:
    """The turns up to the user's last; none where that is blank."""
    history = values.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Refused(BAD_HISTORY, shown(history))
    turns = [_turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    parts = [_text(values.get(key, "")) for key in ("instruction", "input")]
    text = "\n\n".join(part for part in parts if part.strip())
    return [*turns, _turn("user", text)] if text else []


def _prompt_and_sides(values: dict[str, Any], *names: str) -> tuple[list[Message], list[list[Message]]]:
    """The prompt of a row, and the answers under ``names`` without it."""
    prompt = _messages(values.get("prompt", ""), "user")
    sides = [_messages(values.get(name, ""), "assistant") for name in names]
    _check_sides(sides, -1)
    whole = [side for side in sides if side[0]["role"] != "assistant"]
    system = [turns.pop(0) for turns in (prompt, *whole) if turns and turns[0]["role"] == "system"]
    shared = prompt
    if len(whole) == len(sides) > 1:
        alike = takewhile(lambda turns: turns[0] == turns[1], zip(*map(_said, whole), strict=False))
        shared = whole[0][: len(list(alike))]
    if not _contains(shared, prompt) or any(_said([turn]) != _said(system[:1]) for turn in system):
        raise Refused(OTHER_PROMPT)
    _asked(shared)
    for side in whole:
        if _said(side[: len(shared)]) != _said(shared):
            raise Refused(OTHER_PROMPT)
        del side[: len(shared)]
    if len(sides) > 1 and _said(sides[0]) == _said(sides[1]):
        raise Refused(EQUAL_SIDES)
    _check_sides(sides, 0)
    _check_prompt(shared)
    shared = _with_system(values, system[:1] + shared)
    for side in sides:
        _check_turns(shared + side)
    return shared, sides


def _contains(turns: list[Message], part: list[Message]) -> bool:
    """Whether the messages ``part`` follow on each other somewhere in ``turns``: a text may be any turn of the user."""
    said, wanted = _said(turns), _said(part)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) + 1))


def _said(turns: list[Message]) -> list[Any]:
    """What tells messages apart."""
    return [(turn["role"], turn["content"].strip(), turn.get("tool_calls")) for turn in turns]


# ---- messages ----


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": _text(content)}


def _messages(value: Any, role: str | None = None) -> list[Message]:
    """A list of messages. With ``role`` it may be one message, or a text, which is that role's; of a blank one none."""
    if role and isinstance(value, str):
        return [_turn(role, value)] if value.strip() else []
    if role and isinstance(value, dict):
        return [_message(value)]
    if isinstance(value, str):  # tables may keep JSON
        try:
            value = parse_json(value)
        except Refused as refusal:
            raise Refused(NO_TURNS, f"a text that is {refusal}") from None
    if not isinstance(value, list):
        raise Refused(NO_TURNS, shown(value))
    return [_message(message) for message in value]


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise Refused(BAD_MESSAGE, shown(value))
    given = {key: item for key, item in value.items() if item is not None}
    author, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
    role = ROLES.get(author) if isinstance(author, str) else None
    if role is None:
        raise Refused(UNKNOWN_ROLE, shown(author))
    if "function_call" in given:  # OpenAI's older form
        given["tool_calls"] = [given.pop("function_call")]
    elif author == "function_call" and (calls := _calls_of(content)):
        given["tool_calls"], content = calls, ""
    if calls := given.pop("tool_calls", []):
        if role != "assistant":
            raise Refused(BAD_CALLS, f"of a {role} turn")
        given["tool_calls"] = _calls(calls)
        content = "" if content is None else content
    if "weight" in given and (type(given["weight"]) is not int or given["weight"] not in (0, 1)):
        raise Refused(BAD_WEIGHT, shown(given["weight"]))
    return {**_turn(role, content), **given}


def _text(content: Any) -> str:
    """A text, or that of a list of parts."""
    parts = [content]
    if isinstance(content, list):
        parts = [part.get("text") if _is_text(part) else part for part in content]
    if wrong := [part for part in parts if not isinstance(part, str)]:
        raise Refused(NO_TEXT, shown(wrong[0]))
    return "".join(parts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in (None, "text", "input_text", "output_text")


def _calls_of(text: Any) -> list[Any]:
    """The tool calls that a text is, an object or a list; none where it is something else."""
    try:
        found = parse_json(text) if isinstance(text, str) else []
        return _calls(found if isinstance(found, list) else [found])
    except Refused:
        return []


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, but with objects as arguments: of a text, templates would write a JSON string."""
    if not isinstance(value, list):
        raise Refused(BAD_CALLS, shown(value))
    calls = []
    for call in value:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(BAD_CALLS, shown(call))
        arguments = function.get("arguments") or {}
        try:
            arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
        except Refused as refusal:
            raise Refused(BAD_CALLS, f"arguments {refusal}") from None
        if not isinstance(arguments, dict):
            raise Refused(BAD_CALLS, f"arguments {shown(arguments)}")
        known = {} if call.get("id") is None else {"id": call["id"]}
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(values: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = values.get("tools", [])
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else []
        except Refused as refusal:
            raise Refused(BAD_TOOLS, str(refusal)) from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(BAD_TOOLS, shown(tools))
    return tools or None


def _with_system(values: dict[str, Any], messages: list[Message]) -> list[Message]:
    """``messages`` after the system turn that a row has apart from them."""
    system = _turn("system", values.get("system", ""))
    return messages if not system["content"].strip() or messages[:1] == [system] else [system, *messages]


# ---- checks ----


def _says_something(turns: list[Message]) -> bool:
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in turns)


def _answered(value: Any) -> list[Message]:
    if not (turns := _messages(value, "assistant")):
        raise Refused(EMPTY_ANSWER)
    return turns


def _asked(turns: list[Message]) -> list[Message]:
    if not turns:
        raise Refused(NO_PROMPT)
    return turns


def _check_prompt(turns: list[Message]) -> None:
    if _asked(turns)[-1]["role"] not in ("user", "tool"):
        raise Refused(PROMPT_END, turns[-1]["role"])


def _check_sides(sides: list[list[Message]], number: int) -> None:
    """Raise Refused unless each side says something, and the turn ``number`` of it is the assistant's."""
    if not all(map(_says_something, sides)):
        raise Refused(EMPTY_SIDE)
    for side in sides:
        if side[number]["role"] != "assistant":
            raise Refused(NOT_ANSWER, side[number]["role"])


def _check_turns(messages: list[Message]) -> None:
    """Raise Refused unless the user begins, or a system turn and then the user, and the roles alternate."""
    if not messages:
        raise Refused(NO_TURNS)
    previous = ""
    for message in messages:
        role = message["role"]
        if role == "system" and previous:
            raise Refused(LATE_SYSTEM)
        if role == previous and role != "tool":  # calls may be parallel
            raise Refused(REPEATED, role)
        if previous in ("", "system") and role not in ("system", "user"):
            raise Refused(BAD_START, role)
        if role == "assistant" and not _says_something([message]):
            raise Refused(EMPTY_ANSWER)
        previous = role
