"""Files of rows, and what the readers make of them: for the tests of reading."""

from __future__ import annotations

import json

from fastllm.posttraining.rows import Report


def turns(*texts: str) -> list[dict]:
    """Messages: a letter for the role, and the text."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[1:].strip()} for text in texts]


CHAT = turns("u hi", "a hello")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
WEATHER = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def written(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read(reader, path) -> tuple[list, Report]:
    report = Report()
    found = list(reader(path, report))
    for _ in found:
        report.keep()
    assert report.read == report.kept + sum(tally.count for tally in report.dropped.values())
    return found, report


def one(reader, tmp_path, row):
    """What a row becomes."""
    found, report = read(reader, written(tmp_path / "a.jsonl", row))
    assert not report.dropped and found[0].where == "a.jsonl:1"
    return found[0] if len(found) == 1 else found


def dropped(report: Report) -> dict:
    return {reason: tally.places for reason, tally in report.dropped.items()}


def assert_dropped(reader, tmp_path, row, reason, detail):
    """A row, in line 2, is dropped."""
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n")
    found, report = read(reader, path)
    assert not found
    assert dropped(report) == {reason: [f"a.jsonl:2: {detail}" if detail else "a.jsonl:2"]}
