"""The report of a tour, a page: what went in, what came out, with intervals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.corpus.report import dropped
from ..files import write_atomic
from ..input_files import read_json
from ..training.metrics import read_log
from .figure import draw
from .measures import Measure, read_measures, table
from .runner import State, shown
from .stages import BASE, CORPUS, SAMPLES, TOKENS, Stage

REPORT, PICTURE = "report.md", "report.png"


def write_report(folder: Path, state: State, stages: Sequence[Stage]) -> list[Measure]:
    """``report.md`` and ``report.png`` of a finished tour; returns the measures."""
    corpus, run = read_json(folder / CORPUS / "report.json"), read_json(folder / BASE / "run.json")
    measures = read_measures(folder)
    by_filter = Counter[str]()
    for name, _, documents, _ in dropped(corpus):
        by_filter[name.replace("_", " ")] += documents
    draw(folder / PICTURE, by_filter, read_log(folder / BASE / "log.jsonl"), measures)
    lines = [
        "# From raw text to a chatbot",
        "",
        f"fastllm {state.version}, seed {state.seed}, {sum(state.seconds.values()) / 60:.1f} minutes"
        + (", quick: the model is small and learns little" if state.quick else ""),
        "",
        f"![what was dropped, how the model learnt, what it can do]({PICTURE})",
        "",
        "## What came out",
        "",
        *table(measures, goals=not state.quick),
        "",
        "Shares of answers with their 95 % intervals (Wilson). Before and after pre-training in the first line, before "
        "and after alignment in the others. What is asked is told in the corpus; no question of the corpus or of a "
        "chat is about these people, towns and animals.",
        "",
        "## What went in",
        "",
        *_sources(corpus),
        "",
        f"Dropped: {', '.join(f'{n:,} by {name}' for name, n in by_filter.items()) or 'nothing'}.",
        "",
        f"Pre-training: {run['parameters']:,} parameters, {run['steps']:,} steps, {run['tokens']:,} tokens "
        f"({_tokens(folder):,} in the corpus), {run['tokens_per_second']:,.0f} tokens a second on {run['device']}.",
        "",
        "## How it answers",
        "",
        *_samples(folder / SAMPLES),
        "",
        "## The stages",
        "",
        *_stages(state, stages),
    ]
    write_atomic(folder / REPORT, ("\n".join(lines) + "\n").encode())
    return measures


def _sources(corpus: dict[str, Any]) -> Iterator[str]:
    yield "| source | documents | kept | characters kept |"
    yield "|---|---:|---:|---:|"
    for source in corpus["sources"]:
        yield f"| {source['name']} | {source['read'][0]:,} | {source['kept'][0]:,} | {source['kept'][1]:,} |"


def _tokens(folder: Path) -> int:
    return sum(shard["tokens"] for shard in read_json(folder / TOKENS / "index.json")["shards"])


def _samples(path: Path) -> Iterator[str]:
    yield "| user | model |"
    yield "|---|---|"
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        said = values.get("text") or values.get("error", "")
        cells = (values["messages"][-1]["content"], said)
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _stages(state: State, stages: Sequence[Stage]) -> Iterator[str]:
    yield "| seconds | stage | command |"
    yield "|---:|---|---|"
    for stage in stages:
        command = f"`{shown(stage.command)}`" if stage.command else ""
        yield f"| {state.seconds[stage.name]:.1f} | {stage.name} | {command} |"
