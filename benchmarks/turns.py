"""Implementations that take turns, and the table of what they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

TURNS = 3


@dataclass
class Row:
    """A measurement: ours and a peer's, the median of turns with the lowest and highest."""

    what: str
    unit: str
    ours: tuple[float, float, float]  # median, lowest, highest
    peer: str = ""
    theirs: tuple[float, float, float] = (0.0, 0.0, 0.0)
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours[0] / self.theirs[0] if self.theirs[0] else 0.0


def in_turns(calls: dict[str, Callable[[], float]], turns: int = TURNS) -> dict[str, tuple[float, float, float]]:
    """The figures of each call, which take turns: median, lowest and highest."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            found[name].append(call())
    return {name: (statistics.median(values), min(values), max(values)) for name, values in found.items()}


def table(rows: list[Row]) -> str:
    lines = ["| | ours | spread | peer | its | ratio | |", "|---|---:|---:|---|---:|---:|---|"]
    for row in rows:
        middle, low, high = row.ours
        theirs = f"{row.theirs[0]:,.2f}" if row.peer else ""
        ratio = f"{row.ratio:.2f}" if row.peer else ""
        lines.append(
            f"| {row.what} | {middle:,.2f} {row.unit} | {low:,.2f}–{high:,.2f} | {row.peer} | {theirs} | {ratio} "
            f"| {row.note} |"
        )
    return "\n".join(lines)
