"""What ``fastllm data inspect`` shows of a corpus: the report's figures, and samples of what was kept and dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...errors import UserError, did_you_mean
from ...input_files import parse_json, read_bytes
from .report import DROP_HEAD, SOURCE_HEAD, dropped, skipped, source_rows
from .shards import SAMPLES, read_report

BAR = 40  # characters of the longest bar
LANGUAGES = 12


def inspect(folder: Path, samples: int = 1, only: str = "") -> RenderableType:
    """Tables of a corpus.

    Args:
        folder: of the corpus.
        samples: how many to show of what was kept, and of what each filter dropped for each reason.
        only: show samples of this filter alone ("kept" for those that were kept), in full.
    """
    report = read_report(folder)
    found = _samples(folder)
    if only:
        fates = dict.fromkeys(entry["fate"] for entry in found)
        if only not in fates:
            raise UserError(f"there are no samples of {only!r} in {folder}{did_you_mean(only, fates)}")
        return Group(*(_sample(entry, 10**6) for entry in found if entry["fate"] == only))
    share = report["documents"] / max(report["read"][0], 1)
    parts: list[RenderableType] = [
        f"{report['documents']:,} documents, {report['characters']:,} characters in {len(report['shards'])} shards: "
        f"{share:.1%} of the {report['read'][0]:,} documents that were read",
        _WideOrLong("sources", SOURCE_HEAD, source_rows(report)),
    ]
    if rows := [[name, why, f"{n:,}", f"{size:,}"] for name, why, n, size in dropped(report)]:
        parts.append(_table("dropped", DROP_HEAD, rows, words=2))
    if passed := skipped(report):
        rows = [[reason, f"{n:,}"] for reason, n in passed.most_common()]
        parts.append(_table("passed over", ["reason", "records"], rows, words=1))
    lengths = report["lengths"]["kept"]
    parts.append(_bars("characters", [(f"below {int(size):,}", n) for size, n in lengths.items()]))
    parts.append(_bars("language", list(report["languages"].items())[:LANGUAGES]))
    if report["damage"]:
        rows = [[entry["where"], entry["message"]] for entry in report["damage"][:20]]
        parts.append(_table(f"damage: {report['problems']:,}", ["where", "what"], rows, words=2))
    shown: dict[str, int] = {}
    for entry in found:
        key = f"{entry['fate']}: {entry['reason']}"
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= samples:
            parts.append(_sample(entry, 300))
    return Group(*parts)


def _samples(folder: Path) -> list[dict[str, Any]]:
    path = folder / SAMPLES
    lines = read_bytes(path, 2**28).splitlines()
    return [parse_json(line, path) for line in lines]


def _table(title: str, head: list[str], rows: Iterable[list[str]], words: int) -> Table:
    """``words``: how many of the columns are words; the others are numbers."""
    table = Table(title=Text(_printable(title), "italic"), title_justify="left")
    for n, name in enumerate(head):
        table.add_column(name, justify="left" if n < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    return table


class _WideOrLong:
    """A table of many columns; on a terminal that is too narrow for them a table of two for each row."""

    def __init__(self, title: str, head: list[str], rows: list[list[str]]) -> None:
        self._title, self._head, self._rows = title, head, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        numbers = sum(max(len(row[n]) for row in (self._head, *self._rows)) + 3 for n in range(1, len(self._head)))
        if numbers + 12 <= options.max_width:
            yield _table(self._title, self._head, self._rows, words=2)
            return
        for row in self._rows:
            pairs = zip(self._head[1:], row[1:], strict=True)
            yield _table(f"{self._title}: {row[0]}", ["", "number"], [list(pair) for pair in pairs], words=1)


def _bars(name: str, counts: list[tuple[str, int]]) -> Table:
    table = Table(name, "documents", "", box=None)
    table.columns[1].justify = "right"
    most = max((n for _, n in counts), default=1)
    for label, n in counts:
        table.add_row(Text(label), f"{n:,}", "█" * max(1, round(BAR * n / most)))
    return table


def _sample(entry: dict[str, Any], most: int) -> Text:
    fate = "kept" if entry["fate"] == "kept" else f"dropped by {entry['fate']}: {entry['reason']}"
    where = entry.get("url") or entry.get("title") or entry["id"]
    text = json.dumps(entry["text"][:most], ensure_ascii=False)
    place = _printable(f"{entry['source']} {where}")
    return Text.assemble((f"\n{fate}\n", "bold"), (f"{place}\n", "dim"), _printable(text))


def _printable(text: str) -> str:
    """Without the control characters that a document may send to a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
