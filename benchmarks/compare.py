"""What got slower from one result to another, with the noise taken into account."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .cases import is_ours
from .record import Result, Row

LEAST = 0.05  # a change of fewer per cent is not worth a word


@dataclass(frozen=True)
class Change:
    """One implementation of one case in both results."""

    row: Row  # the later one
    ratio: float  # of the medians, later to earlier, less the machine's drift; infinite where the later one failed
    noise: float  # three standard errors of its logarithm
    drift: float  # of the same case's implementations that are not ours

    @property
    def verdict(self) -> str:
        if self.row.error:
            return "fails"
        change = math.log(self.ratio)
        if abs(change) <= max(self.noise, math.log1p(LEAST)):
            return "same"
        return "slower" if change > 0 else "faster"


def compare(earlier: Result, later: Result) -> list[Change]:
    """Every row of ours that both have, or that has failed since.

    The statistic: the logarithm of the ratio of the medians. The standard error of a median is 1.25 σ/√n (normal
    noise), with σ from the quartiles, (high − low)/1.35. What does not contain our code (PyTorch, a copy) is the
    control: the median of its ratios in a case is the machine's drift, which is taken off, and whose own scatter
    counts as noise too. A run differs from the next by more than its quartiles tell (where memory lies, say): how far
    controls of one case drift apart, in the median of all cases, counts for each row.
    """
    before = {(row.case, row.at, row.implementation): row for row in earlier.rows if not row.error}
    pairs: dict[tuple, list[tuple[Row, Row]]] = {}
    changes: list[Change] = []
    for row in later.rows:
        old = before.get((row.case, row.at, row.implementation))
        if old is not None and not row.error:
            pairs.setdefault((row.case, row.at), []).append((old, row))
        elif old is not None and is_ours(row.implementation):
            changes.append(Change(row, math.inf, 0.0, 1.0))
    between_runs = _between_runs(pairs.values())
    for case in pairs.values():
        control = [(_change(*pair), _error(*pair)) for pair in case if not is_ours(pair[1].implementation)]
        drift = statistics.median(c for c, _ in control) if control else 0.0
        scatter = max((abs(c - drift) for c, _ in control), default=0.0) + max((e for _, e in control), default=0.0)
        for old, row in case:
            if is_ours(row.implementation):
                noise = 3 * math.hypot(_error(old, row), scatter / 2, between_runs)
                changes.append(Change(row, math.exp(_change(old, row) - drift), noise, math.exp(drift)))
    return changes


def _between_runs(cases: Iterable[list[tuple[Row, Row]]]) -> float:
    """Standard deviation of a control's change, from the differences within cases (normal: their median is 0.95 σ)."""
    apart = []
    for case in cases:
        control = [_change(*pair) for pair in case if not is_ours(pair[1].implementation)]
        apart += [abs(a - b) for a, b in itertools.combinations(control, 2)]
    return statistics.median(apart) / 0.95 if apart else 0.0


def _change(old: Row, new: Row) -> float:
    return math.log(new.seconds / old.seconds)


def _error(old: Row, new: Row) -> float:
    return math.hypot(*(1.25 * (r.high - r.low) / 1.35 / r.seconds / math.sqrt(r.rounds) for r in (old, new)))


def table(changes: list[Change]) -> str:
    """Markdown, what changed first."""
    order = {"fails": 0, "slower": 1, "faster": 2, "same": 3}
    lines = ["| case | implementation | verdict | time, times | ± | machine's drift |", "|---|---|---|---:|---:|---:|"]
    for c in sorted(changes, key=lambda c: (order[c.verdict], -abs(math.log(c.ratio)))):
        case = f"{c.row.op} {c.row.direction} {c.row.size} {c.row.dtype}"
        noise = math.expm1(c.noise)
        lines.append(f"| {case} | {c.row.implementation} | {c.verdict} | {c.ratio:.2f} | {noise:.0%} | {c.drift:.2f} |")
    counts = {v: sum(c.verdict == v for c in changes) for v in order}
    return "\n".join(lines) + "\n\n" + ", ".join(f"{n} {v}" for v, n in counts.items()) + "\n"
