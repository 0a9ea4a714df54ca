"""Results as JSON, Markdown and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import atomic, write_atomic
from ..input_files import read_json
from .items import Item
from .run import Key, Sample
from .statistics import paired

SHARES = ("acc", "acc_norm", "exact_match", "strict_match", "match")  # metrics of items that are 0 or 1
TEXT = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")  # of texts
LIMIT = 2**28  # bytes of a file of results
# What counts in a result mean, for a reader.
NOTES = {
    "truncated": "prompts were cut off on the left",
    "fewer_shots": "prompts have fewer shots, to fit into the context",
    "retokenized": "choices are joined with the end of their prompt by the tokenizer",
    "bad_rows": "rows were left out, because they can't be used",
}


def finite(value: Any) -> Any:
    """``value`` for JSON, which has no NaN: null, and no more digits than mean something."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """``path``, and beside it the same as .md and .png."""
    write_atomic(path, (json.dumps(finite(results), indent=2, ensure_ascii=False) + "\n").encode())
    write_atomic(path.with_suffix(".md"), markdown(results).encode())
    plot(results, path.with_suffix(".png"))


def read_results(path: Path) -> dict[str, Any]:
    """UserError where ``path`` has no results."""
    found = read_json(path, LIMIT)
    if not isinstance(found.get("tasks"), dict) or not isinstance(found.get("model"), str):
        raise UserError(f"{path} holds no results of fastllm eval")
    return found


def metrics_of(task: Mapping[str, Any]) -> list[str]:
    """The metrics of a task's results, the first one first."""
    known = [metric for metric in (*SHARES, *TEXT) if metric in task]
    return sorted(known, key=[*task].index)


def lines(name: str, task: Mapping[str, Any]) -> Iterator[tuple[str, str, float, Sequence[float] | None, int]]:
    """Rows of a table: task, metric, value, interval, items."""
    for metric in metrics_of(task):
        interval = task.get(f"{metric}_interval", task.get("interval") if metric == "bits_per_byte" else None)
        yield name, metric, task[metric], interval, task["n"]
        if (macro := f"{metric}_macro") in task:
            yield name, f"{metric}, mean of subjects", task[macro], task[f"{macro}_interval"], task["n"]


def notes(name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know of a task's numbers."""
    if found := task.get("contamination"):
        shared = f"{found['items']:,} of {task['n']:,} items share a run of {found['ngram']} words with {found['data']}"
        yield f"{name}: {shared}; {found['too_short']:,} are too short to be looked for"
    if "limit" in task:
        by = " of each subject" if "groups" in task else ""
        yield f"{name}: only the first {task['limit']:,} of the rows{by}: {task['n']:,} of {task['rows']:,}"
    for key, meaning in NOTES.items():
        if key in task:
            fewest = f" (down to {task['fewest_shots']})" if key == "fewer_shots" and "fewest_shots" in task else ""
            yield f"{name}: {task[key]:,} {meaning}{fewest}"


def shown_interval(interval: Sequence[float] | None) -> str:
    if interval is None or any(part is None or not math.isfinite(part) for part in interval):
        return ""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def table(results: Mapping[str, Any]) -> str:
    """For a terminal."""
    rows = [("task", "metric", "value", "95 % interval", "items")]
    for name, task in results["tasks"].items():
        rows += [(t, m, f"{v:.4f}" if v < 1e6 else f"{v:.3g}", shown_interval(i), f"{n:,}")
                 for t, m, v, i, n in lines(name, task)]  # fmt: skip
    text = _aligned(rows)
    for name, task in results["tasks"].items():
        text += [f"note: {note}" for note in notes(name, task)]
    if comparison := results.get("comparison"):
        text += ["", f"against {comparison['model']}, item by item:", *_aligned([*compared_rows(comparison)])]
    return "\n".join(text)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(results: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items() if value not in (None, ""))
    text = [
        f"# {results['model']}",
        "",
        settings,
        "",
        "| task | metric | value | 95 % interval | stderr | items | shots |",
    ]
    text.append("|---|---|---:|---|---:|---:|---:|")
    for name, task in results["tasks"].items():
        for t, metric, value, interval, n in lines(name, task):
            key = metric.replace(", mean of subjects", "_macro")
            stderr = task.get(f"{key}_stderr", task.get("stderr") if key == "bits_per_byte" else None)
            shown = "" if stderr is None or not math.isfinite(stderr) else f"{stderr:.4f}"
            text.append(f"| {t} | {metric} | {value:.4f} | {shown_interval(interval)} | {shown} | {n:,} "
                        f"| {task.get('shots', '')} |")  # fmt: skip
    said = [note for name, task in results["tasks"].items() for note in notes(name, task)]
    text += [
        "",
        *(f"- {note}" for note in said),
        "",
        "Intervals of shares are Wilson's; of several subjects the value is",
    ]
    text += ["that of all items together, unless it says mean of subjects."]
    for name, task in results["tasks"].items():
        text += _contaminated(name, task) + _groups(name, task)
    text += _compared(results.get("comparison"))
    return "\n".join(text) + "\n"


def _contaminated(name: str, task: Mapping[str, Any]) -> list[str]:
    found = task.get("contamination")
    if not found:
        return []
    text = [
        "",
        f"## {name}: contamination",
        "",
        "| items | metric | value | 95 % interval | items |",
        "|---|---|---:|---|---:|",
    ]
    for part in ("clean", "contaminated"):
        for metric in metrics_of(own := found.get(part, {})):
            interval = shown_interval(own[f"{metric}_interval"])
            text.append(f"| {part} | {metric} | {own[metric]:.4f} | {interval} | {own['n']:,} |")
    return text


def _groups(name: str, task: Mapping[str, Any]) -> list[str]:
    text: list[str] = []
    for title, key in (("categories", "categories"), ("subjects", "groups")):
        if not task.get(key):
            continue
        metrics = metrics_of(task)
        text += ["", f"## {name}: {title}", "", f"| | {' | '.join(f'{m} | 95 % interval' for m in metrics)} | items |"]
        text.append("|---|" + "---:|---|" * len(metrics) + "---:|")
        for group, own in task[key].items():
            cells = " | ".join(f"{own[m]:.4f} | {shown_interval(own[f'{m}_interval'])}" for m in metrics)
            text.append(f"| {group} | {cells} | {own['n']:,} |")
    return text


def _compared(comparison: Mapping[str, Any] | None) -> list[str]:
    if not comparison:
        return []
    head, *rows = compared_rows(comparison)
    text = ["", f"## Against {comparison['model']}, item by item", ""]
    text += [f"| {' | '.join(head)} |", "|---|---|---:|---|---:|---:|---:|---:|"]
    return text + [f"| {' | '.join(row)} |" for row in rows]


def compared_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A table of a paired comparison, its head first."""
    yield "task", "metric", "difference", "95 % interval", "right alone", "wrong alone", "p (McNemar)", "items"
    for name, found in comparison["tasks"].items():
        for metric, own in found.items():
            counts = f"{own['won']:,}", f"{own['lost']:,}", f"{own['p']:.2g}", f"{own['n']:,}"
            yield name, metric, f"{own['difference']:+.4f}", shown_interval(own["interval"]), *counts


def check_comparable(items: Sequence[Item], theirs: Mapping[Key, Sample]) -> None:
    """Raise UserError where another model was asked none of the items in the same words."""
    if not any(item.key in theirs and theirs[item.key].digest == item.digest for item in items):
        raise UserError("--compare: no item was asked of both models in the same words (tasks, shots, chat)")


def compare(ours: Sequence[Sample], theirs: Mapping[Key, Sample]) -> dict[str, Any]:
    """Two models, compared by task and metric over the items that both were asked in the same words."""
    tasks: dict[str, dict[str, Any]] = {}
    same = [s for s in ours if s.key in theirs and theirs[s.key].digest == s.digest]
    for name in dict.fromkeys(sample.key[0] for sample in same):
        pairs = [(sample.metrics, theirs[sample.key].metrics) for sample in same if sample.key[0] == name]
        shared = [metric for metric in pairs[0][0] if metric in pairs[0][1]]
        tasks[name] = {m: paired([own[m] for own, _ in pairs], [other[m] for _, other in pairs]) for m in shared}
    return tasks


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each task, subject and metric, with its interval."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    bars: list[tuple[str, float, Sequence[float]]] = []
    for name, task in results["tasks"].items():
        metric = next((m for m in metrics_of(task) if m in SHARES), None)
        if metric is None:
            continue
        bars.append((f"{name} ({metric})", task[metric], task[f"{metric}_interval"]))
        for key in ("categories", "groups"):
            bars += [(f"{group}", own[metric], own[f"{metric}_interval"]) for group, own in task.get(key, {}).items()]
    if not bars:
        return
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(bars)), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    values = [value for _, value, _ in bars]
    off = [[max(0.0, v - i[0]) for _, v, i in bars], [max(0.0, i[1] - v) for _, v, i in bars]]
    colors = ["tab:blue" if label.endswith(")") else "lightsteelblue" for label, _, _ in bars]
    axes.barh(places, values, xerr=off, color=colors, ecolor="dimgray", capsize=2)
    axes.set_yticks(places, [_plain(label.replace("_", " ")) for label, _, _ in bars], fontsize=8)
    limits: dict[str, Any] = {"xlim": (0, 1), "ylim": (len(bars) - 0.4, -0.6)}
    axes.set(title=_plain(results["model"]), xlabel="share, with its 95 % interval", **limits)
    axes.grid(axis="x", alpha=0.3)
    with atomic(path) as part:
        figure.savefig(part, format="png")


def _plain(text: str) -> str:
    """``text`` for matplotlib, which takes what is between dollars for a formula."""
    return text.replace("$", r"\$")
