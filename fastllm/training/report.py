"""The report of a run, from its log: what it was, how it went, and what it scored meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import run_dir
from ..console import short
from ..errors import UserError
from ..files import write_atomic
from .metrics import LOG, TASK_PREFIX, read_log
from .plot import plot

REPORT, PLOT = "report.md", "loss.png"
# What run.json says, in the order in which a reader wants it.
FACTS = (
    "status", "method", "base", "step", "steps", "parameters", "trainable_parameters", "tokens", "validation_loss",
    "unigram_loss", "tokens_per_second", "seconds", "precision", "device", "world_size", "spikes",
)  # fmt: skip


def report(run: Path) -> str:
    """Write ``report.md`` and the plot into a run folder, of a finished run or not; returns the report's text.

    Raises:
        UserError: the folder is no run, or its log can't be read.
    """
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    metadata = run_dir.load_metadata(run)
    try:
        records = read_log(run / LOG)
    except OSError as error:
        raise UserError(f"can't read {run / LOG}: {error.strerror}") from None
    plot(run / LOG, run / PLOT, unigram_loss=metadata.get("unigram_loss"))
    lines = [f"# {run.name}", "", "| | |", "|---|---|"]
    lines += [
        f"| {name.replace('_', ' ')} | {_shown(metadata[name])} |" for name in FACTS if metadata.get(name) is not None
    ]
    lines += ["", *_evaluations(records), f"![loss and more]({PLOT})"]
    text = "\n".join(lines) + "\n"
    write_atomic(run / REPORT, text.encode())
    return text


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and abs(value) >= 100_000:
        return short(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _evaluations(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of what was measured at each step that has an evaluation."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        found = {key: value for key, value in record.items() if key.startswith(("validation_", TASK_PREFIX))}
        if found:
            by_step.setdefault(record["step"], {}).update(found)
    columns = list(dict.fromkeys(key for found in by_step.values() for key in found))
    if not columns:
        return
    names = (column.removeprefix(TASK_PREFIX).replace("_", " ").replace(".", " ") for column in columns)
    yield f"| step | {' | '.join(names)} |"
    yield "|---:" * (1 + len(columns)) + "|"
    for step, found in sorted(by_step.items()):
        cells = (f"{found[column]:.4f}" if isinstance(found.get(column), float) else "" for column in columns)
        yield f"| {step:,} | {' | '.join(cells)} |"
    yield ""
