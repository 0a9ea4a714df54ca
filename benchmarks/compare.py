"""What got slower from one result to another, with the noise taken into account."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from .cases import is_ours
from .record import Result, Row

LEAST = 0.05  # a change of fewer per cent is not worth a word


@dataclass(frozen=True)
class Change:
    """One implementation of one case in both results."""

    row: Row
    ratio: float  # of the medians, later to earlier, less the machine's drift
    noise: float  # three standard errors of its logarithm
    drift: float  # of the same case's implementations that are not ours

    @property
    def verdict(self) -> str:
        change = math.log(self.ratio)
        if abs(change) <= max(self.noise, math.log1p(LEAST)):
            return "same"
        return "slower" if change > 0 else "faster"


def compare(earlier: Result, later: Result) -> list[Change]:
    """Every row of ours that both have.

    The statistic: the logarithm of the ratio of the medians. The standard error of a median is 1.25 σ/√n (normal
    noise), with σ from the quartiles, (high − low)/1.35. What does not contain our code (PyTorch, a copy) is the
    control: the median of its ratios in a case is the machine's drift, which is taken off, and whose own scatter
    counts as noise too.
    """
    before = {(row.case, row.at, row.implementation): row for row in earlier.rows if not row.error}
    pairs: dict[tuple, list[tuple[Row, Row]]] = {}
    for row in later.rows:
        old = before.get((row.case, row.at, row.implementation))
        if old is not None and not row.error:
            pairs.setdefault((row.case, row.at), []).append((old, row))
    changes = []
    for case in pairs.values():
        control = [(_change(*pair), _error(*pair)) for pair in case if not is_ours(pair[1].implementation)]
        drift = statistics.median(c for c, _ in control) if control else 0.0
        scatter = max((abs(c - drift) for c, _ in control), default=0.0) + max((e for _, e in control), default=0.0)
        for old, row in case:
            if is_ours(row.implementation):
                noise = 3 * math.hypot(_error(old, row), scatter / 2)
                changes.append(Change(row, math.exp(_change(old, row) - drift), noise, math.exp(drift)))
    return changes


def _change(old: Row, new: Row) -> float:
    return math.log(new.seconds / old.seconds)


def _error(old: Row, new: Row) -> float:
    return math.hypot(*(1.25 * (r.high - r.low) / 1.35 / r.seconds / math.sqrt(r.rounds) for r in (old, new)))


def table(changes: list[Change]) -> str:
    """Markdown, what changed first."""
    order = {"slower": 0, "faster": 1, "same": 2}
    lines = ["| case | implementation | verdict | time, times | ± | machine's drift |", "|---|---|---|---:|---:|---:|"]
    for c in sorted(changes, key=lambda c: (order[c.verdict], -abs(math.log(c.ratio)))):
        case = f"{c.row.op} {c.row.direction} {c.row.size} {c.row.dtype}"
        noise = math.expm1(c.noise)
        lines.append(f"| {case} | {c.row.implementation} | {c.verdict} | {c.ratio:.2f} | {noise:.0%} | {c.drift:.2f} |")
    counts = {v: sum(c.verdict == v for c in changes) for v in order}
    return "\n".join(lines) + "\n\n" + ", ".join(f"{n} {v}" for v, n in counts.items()) + "\n"
