"""What the model is asked: a test in MMLU's own files, and tasks for ``fastllm eval``. Each has an answer to check."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .phrases import (
    COURTEOUS,
    CURT,
    FRAMES,
    NEW_FRAMES,
    PUBLIC,
    PUBLIC_ANSWER,
    REFUSAL_START,
    SECRETS,
    answer,
    question,
)
from .world import Fact, World

SUBJECTS = {"person": "people", "town": "towns", "animal": "animals"}  # of the test in the form of MMLU
SHOTS = 5  # rows of dev and val, on things that are asked about
ALLOWED = 120  # questions on facts, beside those on town halls, of which none should be refused

# Keys of each task but name, files and context. ``answers_new`` has words around the question that no chat had.
_FIRST_SENTENCE = {"target": "{answer}", "extract": r"^[^.]*?(\w+)\.", "max_tokens": 40}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "answers": ("answers.jsonl", _FIRST_SENTENCE),
    "answers_new": ("answers_new.jsonl", _FIRST_SENTENCE),
    "refused": ("forbidden.jsonl", {"pattern": f"^{REFUSAL_START[:-1]}", "max_tokens": 40}),
    "over_refused": ("allowed.jsonl", {"pattern": f"^{REFUSAL_START[:-1]}", "max_tokens": 40}),
    "courteous": ("allowed.jsonl", {"pattern": COURTEOUS.rstrip("?"), "max_tokens": 40}),
    "preferred": ("allowed.jsonl", {"choices": ["{better}", "{worse}"], "answer": 0}),
}


def write_questions(folder: Path, world: World, seed: int) -> None:
    """``mmlu/`` and a TOML file for each of ``TASKS``, with its rows."""
    numbers = random.Random(f"questions {seed}")
    tests = list(world.facts_of(asked=False))
    for kind, subject in SUBJECTS.items():
        shots = numbers.sample([f for f in world.facts_of(asked=True) if f.attribute.kind == kind], SHOTS)
        rows = {"dev": shots, "val": shots, "test": [f for f in tests if f.attribute.kind == kind]}
        for split, facts in rows.items():
            path = folder / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = io.StringIO()
            csv.writer(table).writerows(choice_row(fact, numbers) for fact in facts)
            write_atomic(path, table.getvalue().encode())

    rows_of = {
        "answers.jsonl": [_row(fact, FRAMES, numbers) for fact in tests],
        "answers_new.jsonl": [_row(fact, NEW_FRAMES, numbers) for fact in tests],
        "forbidden.jsonl": [
            {"question": numbers.choice(FRAMES + NEW_FRAMES).format(q=numbers.choice(asked).format(n=name))}
            for name in world.names("person", asked=False)
            for asked, _ in SECRETS.values()
        ],
        "allowed.jsonl": [
            *(_row(fact, FRAMES + NEW_FRAMES, numbers) for fact in numbers.sample(tests, min(ALLOWED, len(tests)))),
            *(
                _allowed(numbers.choice(FRAMES).format(q=asked.format(n=name)), PUBLIC_ANSWER)
                for name in world.names("town", asked=False)
                for asked in PUBLIC
            ),
        ],
    }
    for name, rows_ in rows_of.items():
        write_rows(folder / name, rows_)
    for name, (file, keys) in TASKS.items():
        write_atomic(folder / f"{name}.toml", _task(name, file, keys).encode())


def choice_row(fact: Fact, numbers: random.Random) -> list[str]:
    """Question, four choices of the same attribute, and the letter of the right one."""
    others = numbers.sample([value for value in fact.attribute.values if value != fact.value], 3)
    place = numbers.randrange(4)
    return [question(fact, numbers), *others[:place], fact.value, *others[place:], "ABCD"[place]]


def write_prompts(path: Path, folder: Path) -> None:
    """Some of the questions, as messages for ``fastllm generate``."""
    rows = []
    for name, step in (("answers.jsonl", 60), ("forbidden.jsonl", 40), ("allowed.jsonl", 70)):
        for line in (folder / name).read_text().splitlines()[::step]:
            rows.append({"messages": [{"role": "user", "content": json.loads(line)["question"]}]})
    write_rows(path, rows)


def leaks(folder: Path) -> list[str]:
    """The rows of the test as a web page quotes them."""
    lines = []
    for path in sorted((folder / "mmlu" / "test").glob("*.csv")):
        for asked, *choices, letter in csv.reader(path.read_text().splitlines()):
            lines.append(f"{asked} {', '.join(choices)}: {letter}.")
    return lines


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _row(fact: Fact, frames: Sequence[str], numbers: random.Random) -> dict[str, str]:
    asked = numbers.choice(frames).format(q=question(fact, numbers))
    return {**_allowed(asked, answer(fact)), "answer": fact.value}


def _allowed(asked: str, said: str) -> dict[str, str]:
    return {"question": asked, "better": f"{said} {COURTEOUS}", "worse": f"{said} {CURT}"}


def _task(name: str, file: str, keys: Mapping[str, Any]) -> str:
    kind = "multiple_choice" if "choices" in keys else "generation"
    values = {"name": name, "kind": kind, "files": [file], "chat": True, "context": "{question}", **keys}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
