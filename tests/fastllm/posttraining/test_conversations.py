"""Reading post-training data: files, the forms of rows, and what is dropped."""

from __future__ import annotations

import json

import pytest

from fastllm.data import chat_template
from fastllm.posttraining import conversations as c
from fastllm.posttraining.conversations import read_conversations, read_judged, read_pairs, read_prompts

from .row_files import CALL, CHAT, WEATHER, assert_dropped, one, read, turns, written

# ---- conversations ----


def sharegpt(*texts: str) -> list[dict]:
    """ShareGPT's turns, of "role: text"."""
    return [dict(zip(("from", "value"), text.split(": ", 1), strict=True)) for text in texts]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": CHAT, "score": 1}, CHAT),
        ({"messages": [*turns("s x", "u 1", "a 2"), *CHAT]}, [*turns("s x", "u 1", "a 2"), *CHAT]),
        ({"system": "be kind", "messages": CHAT}, [*turns("s be kind"), *CHAT]),
        ({"system": "be kind", "messages": [*turns("s be kind"), *CHAT]}, [*turns("s be kind"), *CHAT]),
        ({"system": " ", "messages": CHAT}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": None, "conversation": CHAT}, CHAT),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}, ""]}, CHAT[1]]},
            CHAT,
        ),
        ({"messages": [{**CHAT[0], "name": "Jo", "x": None}, CHAT[1]]}, [{**CHAT[0], "name": "Jo"}, CHAT[1]]),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, [CHAT[0], {**CHAT[1], "weight": 0}]),
        ({"messages": [{"role": "developer", "content": "x"}, *CHAT]}, [*turns("s x"), *CHAT]),
        ({"conversations": sharegpt("human: hi", "gpt: hello")}, CHAT),
        (
            {"conversations": sharegpt("user: hi", "chatgpt: hello", "human: 1", "bing: 2")},
            [*CHAT, *turns("u 1", "a 2")],
        ),
        ({"system": "x", "conversations": sharegpt("human: hi", "gpt: hello")}, [*turns("s x"), *CHAT]),
        ({"conversations": sharegpt("system: x", "human: hi", "assistant: hello")}, [*turns("s x"), *CHAT]),
        ({"instruction": "hi", "output": "hello"}, CHAT),
        ({"instruction": "hi", "input": "", "output": "hello", "history": []}, CHAT),
        ({"instruction": "hi", "input": "you", "output": "hello"}, turns("u hi\n\nyou", "a hello")),
        ({"instruction": "", "input": "hi", "output": "hello"}, CHAT),
        (
            {"instruction": "hi", "input": None, "output": "hello", "history": [["1", "2"], ["3", "4"]], "system": "x"},
            [*turns("s x", "u 1", "a 2", "u 3", "a 4"), *CHAT],
        ),
        ({"prompt": "hi", "completion": "hello"}, CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "system": "x"}, [*turns("s x"), *CHAT]),
        ({"prompt": CHAT[0], "completion": CHAT[1]}, CHAT),
        (
            {"prompt": [*turns("u 1", "a 2"), CHAT[0]], "completion": "hello"},
            [*turns("u 1"), {**turns("a 2")[0], "weight": 0}, *CHAT],
        ),
    ],
)
def test_forms_of_conversations(row, messages, tmp_path):
    found = one(read_conversations, tmp_path, row)
    assert found.messages == messages and found.tools is None


def test_parallel_calls(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}, {"id": "2", **CALL}]}
    results = [{"role": "tool", "content": f"r{i}", "tool_call_id": i} for i in "12"]
    row = {"messages": [CHAT[0], calls, *results, CHAT[1]], "tools": [{"type": "function"}]}
    found = one(read_conversations, tmp_path, row)
    assert found.messages == [CHAT[0], {**calls, "content": ""}, *results, CHAT[1]]
    assert found.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'},
    ],
)
def test_forms_of_calls(turn, tmp_path):
    row = {"conversations": [CHAT[0], turn, {"from": "observation", "value": "r"}, CHAT[1]], "tools": "[]"}
    found = one(read_conversations, tmp_path, row)
    assert found.messages == [CHAT[0], WEATHER, *turns("t r"), CHAT[1]] and found.tools is None


def test_calls_that_are_texts_or_have_no_arguments(tmp_path):
    row = {"messages": [CHAT[0], {"from": "function_call", "value": "f(x)"}]}
    assert one(read_conversations, tmp_path, row).messages[1] == turns("a f(x)")[0]
    row = {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]}]}
    assert one(read_conversations, tmp_path, row).messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_forms_of_tools(tools, tmp_path):
    assert one(read_conversations, tmp_path, {"messages": CHAT, "tools": tools}).tools == [{"name": "f"}]


def test_all_roles_of_chat_templates_are_known():
    assert set(chat_template.ROLES) <= c.ROLES.keys()


@pytest.mark.parametrize(
    ("end", "note"),
    [
        (turns("u more"), c.ENDS_WITH_USER),
        (turns("t more"), c.ENDS_WITH_TOOL),
        (turns("t more", "u more"), c.ENDS_WITH_USER),
    ],
)
def test_turns_after_the_last_answer_are_cut(end, note, tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": [*CHAT, *end]})
    found, report = read(read_conversations, path)
    assert found[0].messages == CHAT and not report.dropped
    assert {reason: tally.places for reason, tally in report.notes.items()} == {note: ["a.jsonl:1"]}


def messages(*given) -> dict:
    return {"messages": [*given]}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, c.UNRECOGNISED, "it has no keys"),
        ({"text": 1, "id": 2}, c.UNRECOGNISED, "its keys are text, id"),
        ({"prompt": "a", "completion": None}, c.UNRECOGNISED, "its keys are prompt, completion"),
        (dict.fromkeys("abcdefghijk"), c.UNRECOGNISED, "its keys are a, b, c, d, e, f, g, h, i, j, …"),
        (messages(), c.NO_TURNS, ""),
        ({"messages": 7}, c.NO_TURNS, "7"),
        ({"messages": "hi"}, c.NO_TURNS, "a text that is not JSON: Expecting value at character 0"),
        (messages("hi"), c.BAD_MESSAGE, "'hi'"),
        (messages({"role": "bot", "content": "hi"}), c.UNKNOWN_ROLE, "'bot'"),
        (messages({"content": "hi"}), c.UNKNOWN_ROLE, "None"),
        (messages({"role": ["user"], "content": "hi"}), c.UNKNOWN_ROLE, "['user']"),
        (messages({"role": "user"}, CHAT[1]), c.NO_TEXT, "None"),
        (messages({"role": "user", "content": 7}, CHAT[1]), c.NO_TEXT, "7"),
        (messages({"role": "user", "content": [{"type": "image"}]}, CHAT[1]), c.NO_TEXT, "{'type': 'image'}"),
        (messages({"role": "user", "content": [{"type": "text"}]}, CHAT[1]), c.NO_TEXT, "None"),
        (messages(CHAT[0], {"role": "assistant"}), c.NO_TEXT, "None"),
        ({"messages": CHAT, "system": 7}, c.NO_TEXT, "7"),
        ({"instruction": 7, "output": "x"}, c.NO_TEXT, "7"),
        (messages(CHAT[0], *turns("a")), c.EMPTY_ANSWER, ""),
        (messages(*CHAT, *turns("u 1"), {"role": "assistant", "content": " \n", "tool_calls": []}), c.EMPTY_ANSWER, ""),
        ({"instruction": "hi", "output": " "}, c.EMPTY_ANSWER, ""),
        ({"prompt": "hi", "completion": ""}, c.EMPTY_ANSWER, ""),
        ({"prompt": " ", "completion": "hello"}, c.NO_PROMPT, ""),
        ({"instruction": " ", "input": "", "output": "hello"}, c.NO_PROMPT, ""),
        (messages(CHAT[0], *CHAT), c.REPEATED, "user"),
        (messages(*CHAT, CHAT[1]), c.REPEATED, "assistant"),
        (messages(*CHAT, *turns("s x")), c.LATE_SYSTEM, ""),
        (messages(*turns("s x", "s x"), *CHAT), c.LATE_SYSTEM, ""),
        ({"messages": [*turns("s x"), *CHAT], "system": "y"}, c.LATE_SYSTEM, ""),
        (messages(CHAT[1]), c.BAD_START, "assistant"),
        (messages(*turns("s x", "t y"), *CHAT), c.BAD_START, "tool"),
        (messages(CHAT[0]), c.NO_ANSWER, ""),
        (messages(*turns("s x")), c.NO_ANSWER, ""),
        (messages(CHAT[0], {**CHAT[1], "weight": 0.5}), c.BAD_WEIGHT, "0.5"),
        (messages(CHAT[0], {**CHAT[1], "weight": True}), c.BAD_WEIGHT, "True"),
        (messages(CHAT[0], {**CHAT[1], "weight": 2}), c.BAD_WEIGHT, "2"),
        (messages({**CHAT[0], "tool_calls": [CALL]}, CHAT[1]), c.BAD_CALLS, "of a user turn"),
        (messages(CHAT[0], {**CHAT[1], "tool_calls": 7}), c.BAD_CALLS, "7"),
        (messages(CHAT[0], {**CHAT[1], "tool_calls": [7]}), c.BAD_CALLS, "7"),
        (messages(CHAT[0], {**CHAT[1], "tool_calls": [{"function": {}}]}), c.BAD_CALLS, "{'function': {}}"),
        (
            messages(CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f", "arguments": "x"}]}),
            c.BAD_CALLS,
            "arguments not JSON: Expecting value at character 0",
        ),
        (
            messages(CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
            c.BAD_CALLS,
            "arguments [1]",
        ),
        (
            messages(CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f", "arguments": '{"x": "\\ud800"}'}]}),
            c.BAD_CALLS,
            "arguments half a surrogate pair",
        ),
        ({"messages": CHAT, "tools": "x"}, c.BAD_TOOLS, "not JSON: Expecting value at character 0"),
        ({"messages": CHAT, "tools": {"a": 1}}, c.BAD_TOOLS, "{'a': 1}"),
        ({"messages": CHAT, "tools": ["f"]}, c.BAD_TOOLS, "['f']"),
        ({"instruction": "hi", "output": "x", "history": "no"}, c.BAD_HISTORY, "'no'"),
        ({"instruction": "hi", "output": "x", "history": [["1"]]}, c.BAD_HISTORY, "[['1']]"),
    ],
)
def test_conversations_that_are_dropped(row, reason, detail, tmp_path):
    assert_dropped(read_conversations, tmp_path, row, reason, detail)


# ---- pairs, judged answers ----

BETTER, WORSE = turns("a better"), turns("a worse")
ASKED = turns("u 1", "a 2", "u 3")
PAIR = (ASKED[:1], BETTER, WORSE)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "1", "chosen": "better", "rejected": "worse"}, PAIR),
        ({"prompt": ASKED[:1], "chosen": BETTER, "rejected": WORSE[0]}, PAIR),
        ({"prompt": "1", "chosen": [*ASKED[:1], *BETTER], "rejected": [*ASKED[:1], *WORSE]}, PAIR),
        ({"prompt": "1", "chosen": [*ASKED[:1], *BETTER], "rejected": "worse"}, PAIR),
        ({"chosen": [*ASKED[:1], *BETTER], "rejected": [*ASKED[:1], *WORSE]}, PAIR),
        (
            {"prompt": " 1 ", "chosen": [*ASKED[:1], *BETTER], "rejected": [{"role": "user", "content": "1 "}, *WORSE]},
            PAIR,
        ),
        ({"prompt": ASKED, "chosen": BETTER, "rejected": WORSE}, (ASKED, BETTER, WORSE)),
        ({"prompt": ASKED, "chosen": ASKED + BETTER, "rejected": ASKED + WORSE}, (ASKED, BETTER, WORSE)),
        ({"prompt": "3", "chosen": ASKED + BETTER, "rejected": ASKED + WORSE}, (ASKED, BETTER, WORSE)),
        (
            {"chosen": [*turns("s x"), *ASKED, *BETTER], "rejected": [*ASKED, *WORSE]},
            (turns("s x") + ASKED, BETTER, WORSE),
        ),
        ({"prompt": "1", "chosen": "better", "rejected": "worse", "system": "x"}, (turns("s x", "u 1"), BETTER, WORSE)),
        (
            {"chosen": [*ASKED[:1], *BETTER, *ASKED[2:], *BETTER], "rejected": [*ASKED[:1], *WORSE]},
            (ASKED[:1], [*BETTER, *ASKED[2:], *BETTER], WORSE),
        ),
        (
            {"prompt": "1", "chosen": [WEATHER, *turns("t 5"), *BETTER], "rejected": [WEATHER]},
            (ASKED[:1], [WEATHER, *turns("t 5"), *BETTER], [WEATHER]),
        ),
    ],
)
def test_forms_of_pairs(row, pair, tmp_path):
    found = one(read_pairs, tmp_path, {**row, "tools": [{"name": "f"}]})
    assert found[:3] == pair and found.tools == [{"name": "f"}]
    good, bad = one(lambda *given: list(read_judged(*given)), tmp_path, row)
    assert good[:3] == (pair[0], pair[1], True) and bad[:3] == (pair[0], pair[2], False)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "1", "answer": "x"}, c.UNRECOGNISED, "its keys are prompt, answer"),
        ({"prompt": "1", "chosen": "x"}, c.EMPTY_SIDE, ""),
        ({"prompt": "1", "chosen": "x", "rejected": " "}, c.EMPTY_SIDE, ""),
        ({"prompt": "1", "chosen": [], "rejected": "x"}, c.EMPTY_SIDE, ""),
        ({"prompt": "1", "chosen": [*ASKED[:1], *turns("a")], "rejected": [*ASKED[:1], *WORSE]}, c.EMPTY_SIDE, ""),
        ({"prompt": "1", "chosen": "x", "rejected": "x "}, c.EQUAL_SIDES, ""),
        ({"prompt": "1", "chosen": [*ASKED[:1], *BETTER], "rejected": "better"}, c.EQUAL_SIDES, ""),
        ({"chosen": [*ASKED[:1], *BETTER], "rejected": [*ASKED[:1], *BETTER]}, c.EQUAL_SIDES, ""),
        ({"prompt": "1", "chosen": turns("u x"), "rejected": WORSE}, c.NOT_ANSWER, "user"),
        ({"prompt": "1", "chosen": [*BETTER, *turns("u x")], "rejected": WORSE}, c.NOT_ANSWER, "user"),
        ({"chosen": [*ASKED[:2], *turns("u 5"), *BETTER], "rejected": ASKED + WORSE}, c.NOT_ANSWER, "user"),
        ({"prompt": "2", "chosen": [*ASKED[:1], *BETTER], "rejected": [*ASKED[:1], *WORSE]}, c.OTHER_PROMPT, ""),
        ({"prompt": "1", "chosen": [*ASKED[2:], *BETTER], "rejected": "worse"}, c.OTHER_PROMPT, ""),
        (
            {"prompt": turns("s x", "u 1"), "chosen": [*turns("s y", "u 1"), *BETTER], "rejected": "z"},
            c.OTHER_PROMPT,
            "",
        ),
        ({"chosen": "better", "rejected": "worse"}, c.NO_PROMPT, ""),
        ({"prompt": "", "chosen": "better", "rejected": "worse"}, c.NO_PROMPT, ""),
        ({"chosen": [*ASKED[:1], *BETTER], "rejected": [*ASKED[2:], *WORSE]}, c.NO_PROMPT, ""),
        ({"prompt": ASKED[:2], "chosen": "better", "rejected": "worse"}, c.PROMPT_END, "assistant"),
        ({"prompt": [*ASKED, *turns("u x")], "chosen": "better", "rejected": "worse"}, c.REPEATED, "user"),
        ({"prompt": "1", "chosen": [*BETTER, *BETTER], "rejected": "worse"}, c.REPEATED, "assistant"),
        ({"prompt": "1", "chosen": [{"role": "bot", "content": "x"}], "rejected": "y"}, c.UNKNOWN_ROLE, "'bot'"),
        ({"prompt": "1", "chosen": 7, "rejected": "y"}, c.NO_TURNS, "7"),
        ({"prompt": "1", "chosen": "x", "rejected": "y", "tools": 7}, c.BAD_TOOLS, "7"),
    ],
)
def test_pairs_that_are_dropped(row, reason, detail, tmp_path):
    assert_dropped(read_pairs, tmp_path, row, reason, detail)
    assert_dropped(read_judged, tmp_path, row, reason, detail)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "1", "completion": "better"}, ASKED[:1]),
        ({"prompt": ASKED, "completion": BETTER}, ASKED),
        ({"prompt": ASKED, "completion": ASKED + BETTER}, ASKED),
        ({"prompt": "1", "completion": BETTER, "system": "x"}, turns("s x", "u 1")),
    ],
)
@pytest.mark.parametrize("label", [True, False])
def test_forms_of_judged_answers(row, messages, label, tmp_path):
    found = one(read_judged, tmp_path, {**row, "label": label})
    assert found == (messages, BETTER, label, None, "a.jsonl:1")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": "1", "label": True}, c.UNRECOGNISED, "its keys are prompt, label"),
        ({"prompt": "1", "completion": "x"}, c.BAD_LABEL, "None"),
        ({"prompt": "1", "completion": "x", "label": 1}, c.BAD_LABEL, "1"),
        ({"prompt": "1", "completion": "x", "label": "true"}, c.BAD_LABEL, "'true'"),
        ({"prompt": "1", "completion": " ", "label": True}, c.EMPTY_SIDE, ""),
        ({"completion": "x", "label": True}, c.NO_PROMPT, ""),
        ({"prompt": "1", "completion": [*ASKED[2:], *BETTER], "label": True}, c.OTHER_PROMPT, ""),
    ],
)
def test_judged_answers_that_are_dropped(row, reason, detail, tmp_path):
    assert_dropped(read_judged, tmp_path, row, reason, detail)


# ---- prompts ----


@pytest.mark.parametrize(
    ("row", "messages", "other"),
    [
        ({"prompt": "1", "answer": 5, "more": {"a": None}}, ASKED[:1], {"answer": 5, "more": {"a": None}}),
        ({"prompt": ASKED, "answer": None}, ASKED, {"answer": None}),
        ({"prompt": "1", "messages": CHAT}, ASKED[:1], {"messages": CHAT}),
        ({"prompt": "1", "system": "x"}, turns("s x", "u 1"), {}),
        ({"messages": ASKED}, ASKED, {}),
        ({"messages": ASKED + BETTER, "id": 1}, ASKED, {"id": 1}),
        ({"conversations": sharegpt("human: 1", "gpt: 2")}, ASKED[:1], {}),
        ({"question": "1", "answer": "#### 5"}, ASKED[:1], {"answer": "#### 5"}),
        ({"instruction": "1", "input": "2", "output": "3"}, turns("u 1\n\n2"), {"output": "3"}),
        ({"prompt": [*ASKED[:1], WEATHER, *turns("t x")]}, [*ASKED[:1], WEATHER, *turns("t x")], {}),
    ],
)
def test_forms_of_prompts(row, messages, other, tmp_path):
    assert one(read_prompts, tmp_path, row) == (messages, other, "a.jsonl:1", None)


def test_prompts_with_tools(tmp_path):
    found = one(read_prompts, tmp_path, {"prompt": "1", "tools": '[{"name": "f"}]'})
    assert found.tools == [{"name": "f"}] and found.row == {}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"answer": "x"}, c.UNRECOGNISED, "its keys are answer"),
        ({"prompt": " "}, c.NO_PROMPT, ""),
        ({"prompt": []}, c.NO_PROMPT, ""),
        ({"messages": BETTER, "system": "x"}, c.NO_PROMPT, ""),
        ({"prompt": ASKED[:2]}, c.PROMPT_END, "assistant"),
        ({"prompt": turns("s x")}, c.PROMPT_END, "system"),
        ({"messages": ASKED[:1] * 2}, c.REPEATED, "user"),
        ({"question": 7}, c.NO_TURNS, "7"),
        ({"prompt": "1", "tools": 7}, c.BAD_TOOLS, "7"),
    ],
)
def test_prompts_that_are_dropped(row, reason, detail, tmp_path):
    assert_dropped(read_prompts, tmp_path, row, reason, detail)
