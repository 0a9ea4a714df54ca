"""Tasks of the user's own: a TOML file, or a Python file that makes them."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import read_toml
from ..errors import UserError, did_you_mean
from ..input_files import one_line, shown
from .rows import BadRow, Row
from .task import Files, Generation, Metric, Question, Task

KINDS = ("multiple_choice", "generation")
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_NO_FIELD = re.compile(r"[{}][^{}]*\}?")  # what is left of one that is none
# The keys of a file, with the type of each.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "kind": str, "files": list, "shots_files": list, "shots": int, "context": str, "delimiter": str,
    "description": str, "chat": bool,
}  # fmt: skip
_CHOICE_KEYS: dict[str, type | tuple[type, ...]] = {"choices": (str, list), "answer": (str, int)}
_GENERATION_KEYS: dict[str, type | tuple[type, ...]] = {
    "target": str, "pattern": str, "extract": str, "ignore": list, "ignore_case": bool, "max_tokens": int, "stop": list,
}  # fmt: skip


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file. A Python file has ``TASK``, a :class:`~fastllm.evaluation.Task`, or a list ``TASKS``.

    Raises:
        UserError: the file can't be read, or has something wrong, which is named.
    """
    return _read_python(path) if path.suffix == ".py" else [_read_toml(path)]


def _read_python(path: Path) -> list[Task]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} failed: {type(error).__name__}: {one_line(error)}") from error
    found = names.get("TASKS", [names["TASK"]] if "TASK" in names else None)
    if not isinstance(found, list) or not found or not all(isinstance(task, Task) for task in found):
        raise UserError(f"{path} must set TASK to a fastllm.evaluation.Task, or TASKS to a list of them")
    return found


def _read_toml(path: Path) -> Task:
    values = read_toml(path)
    kind = values.get("kind", KINDS[0])
    if kind not in KINDS:
        raise UserError(f"{path}: kind must be {' or '.join(KINDS)}, it is {shown(kind)}")
    known = _KEYS | (_CHOICE_KEYS if kind == KINDS[0] else _GENERATION_KEYS)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: {kind} has no key {key!r}{did_you_mean(key, known)}")
        wanted = known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{path}: {key} must be {_type_name(wanted)}, it is {shown(value)}")
        if isinstance(value, list) and not all(isinstance(part, str) for part in value):
            raise UserError(f"{path}: {key} must be a list of texts")
    for key in ("context", "choices", "target"):
        for text in [values[key]] if isinstance(values.get(key), str) else values.get(key, []):
            if wrong := _NO_FIELD.search(_FIELD.sub("", text)):
                raise UserError(f"{path}: {key}: {wrong[0]!r} is no {{field}} of a row; {{{{ and }}}} are braces")
    if values.get("shots", 0) < 0:
        raise UserError(f"{path}: shots must not be negative, it is {values['shots']}")
    for key in ("files", "context", *(("choices", "answer") if kind == KINDS[0] else ())):
        if not values.get(key) and values.get(key) != 0:
            raise UserError(f"{path}: {key} is missing")
    if isinstance(values.get("choices"), str) and not re.fullmatch(r"\{\w+\}", values["choices"]):
        raise UserError(f"{path}: choices must be a list, or the {{field}} of one, it is {shown(values['choices'])}")
    delimiter = values.get("delimiter", "" if values.get("chat") else " ")
    options: dict[str, Any] = {
        "source": Files(_paths(path, values["files"]), _paths(path, values.get("shots_files", []))),
        "shots": values.get("shots", 0), "delimiter": delimiter, "chat": values.get("chat", False),
        "description": _constant(values.get("description", "")), "shots_split": "shots",
    }  # fmt: skip
    name = values.get("name", path.stem)
    if kind == KINDS[0]:
        question = _choice_question(values["context"], values["choices"], values["answer"])
        return Task(name, question=question, metrics=("acc", "acc_norm"), **options)
    for key in ("pattern", "extract", "stop", "ignore"):
        given = values.get(key)
        if given == "" or (isinstance(given, list) and "" in given):
            raise UserError(f"{path}: {key} is empty: leave it out")
    if ("target" in values) == ("pattern" in values):
        raise UserError(f"{path}: generation needs target or pattern, one of both")
    for key in ("pattern", "extract", "ignore"):
        for pattern in [values[key]] if isinstance(values.get(key), str) else values.get(key, []):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{path}: {key} {pattern!r} is no regular expression: {error}") from None
    generation = Generation(
        max_tokens=values.get("max_tokens", 256), stop=tuple(values.get("stop", ())), extract=values.get("extract", ""),
        ignore=tuple(values.get("ignore", ())), ignore_case=values.get("ignore_case", False),
        pattern=values.get("pattern", ""),
    )  # fmt: skip
    metric: Metric = "match" if generation.pattern else "exact_match"
    if generation.max_tokens < 1:
        raise UserError(f"{path}: max_tokens must be at least 1, it is {generation.max_tokens}")
    question = _generation_question(values["context"], values.get("target"), generation.pattern)
    return Task(name, question=question, metrics=(metric,), generation=generation, **options)


def _type_name(wanted: type | tuple[type, ...]) -> str:
    names = {str: "a text", list: "a list", int: "a whole number", bool: "true or false"}
    return " or ".join(names[kind] for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))


def _paths(path: Path, names: list[str]) -> tuple[Path, ...]:
    paths = tuple(path.parent / name for name in names)
    for file in paths:
        if not file.is_file():
            raise UserError(f"{path}: there is no file {file}")
    return paths


def _constant(text: str) -> Callable[[str], str]:
    return lambda group: text


def filled(template: str, row: Row) -> str:
    """``template`` with the row's values in place of ``{field}``; ``{{`` and ``}}`` are braces."""

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        inside = row.values.get(found[1])
        if isinstance(inside, int | float) and math.isfinite(inside):
            return str(inside)
        return row.text(found[1])

    return _FIELD.sub(value, template)


def _choice_question(context: str, choices: str | list[str], answer: str | int) -> Callable[[Row], Question]:
    def question(row: Row) -> Question:
        if isinstance(choices, list):
            texts = [filled(choice, row) for choice in choices]
        else:
            texts = row.texts(choices.strip("{}"))
        return Question((filled(context, row),), tuple(texts), _gold(answer, texts, row))

    return question


def _gold(answer: str | int, texts: list[str], row: Row) -> int:
    """The place of the answer, which is given as a number from 0, a letter from A, or the text of a choice."""
    whole = None if isinstance(answer, int) else _FIELD.fullmatch(answer)
    value = row.values.get(whole[1]) if whole and whole[1] else answer
    if isinstance(value, int):
        return value
    given = filled(str(answer), row).strip()
    places = {place for place, text in enumerate(texts) if text.strip() == given}
    if given.isdecimal() and len(given) < 10:
        places.add(int(given))
    if len(given) == 1 and "A" <= given <= "Z":
        places.add(ord(given) - ord("A"))
    if not places:
        raise BadRow(f"the answer {shown(given)} is none of the choices, no number and no letter")
    if len(places) > 1:
        raise BadRow(
            f"the answer {shown(given)} may be choice {' or '.join(str(place + 1) for place in sorted(places))}"
        )
    return places.pop()


def _generation_question(context: str, target: str | None, pattern: str) -> Callable[[Row], Question]:
    def question(row: Row) -> Question:
        return Question((filled(context, row),), (pattern if target is None else filled(target, row),), 0)

    return question
