"""The field's best published figures, and how far this library is from them on one GPU.

Figures are of an H100. On another GPU of the data sheets those of bandwidth are scaled by its bandwidth, those of
arithmetic by its matrix rate.

    python -m benchmarks.goals benchmarks/results/nvidia-h100-80gb-hbm3      writes goals.md there
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastllm.files import write_atomic

from .cases import PER_UNIT, Unit, is_ours
from .peaks import DATASHEET
from .record import FILE, Result, Row, best

H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Goal:
    """A rate of a case of ours. ``direction`` "backward" is what forward and backward takes more than forward."""

    op: str
    direction: str
    size: str
    unit: Unit
    figure: float
    whose: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.size}"


GOALS = (
    Goal("flash_attention", "forward", "1×16×16384×128", "TFLOP/s", 648, "FlashAttention-3"),
    Goal("flash_attention", "backward", "1×16×16384×128", "TFLOP/s", 550, "FlashAttention-3"),
    Goal("rms_norm", "forward", "32768×4096", "GB/s", 2904, "Liger (QuACK 2900)"),
    Goal("rms_norm", "forward", "4096×65536", "GB/s", 3020, "QuACK, 32768 rows"),
    Goal("softmax", "forward", "4096×262144", "GB/s", 3010, "QuACK, 32768 rows"),
    Goal("cross_entropy", "forward+backward", "8192×131072", "GB/s", 3163, "QuACK, 16384 rows"),
    Goal("linear_cross_entropy", "forward+backward", "16384×4096×128256", "TFLOP/s", 701, "Liger, 131072 classes"),
)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    figure: float  # on this GPU
    rate: float | None
    implementation: str

    def __str__(self) -> str:
        if self.rate is None:
            return "not measured"
        return "met" if self.rate >= self.figure else f"missed by {1 - self.rate / self.figure:.1%}"


def verdicts(result: Result | None) -> list[Verdict]:
    scale = {"GB/s": 1.0, "TFLOP/s": 1.0}
    gpu = "" if result is None else result.stamp.get("gpu", "")
    if gpu in DATASHEET:
        (bandwidth, rate), (of_h100, rate_of_h100) = DATASHEET[gpu], DATASHEET[H100]
        scale = {"GB/s": bandwidth / of_h100, "TFLOP/s": rate / rate_of_h100}
    found = []
    for goal in GOALS:
        rate, name = _rate(goal, result.rows) if result is not None and gpu else (None, "")
        found.append(Verdict(goal, goal.figure * scale[goal.unit], rate, name))
    return found


def _rate(goal: Goal, rows: Sequence[Row]) -> tuple[float | None, str]:
    """The best of ours, in the goal's unit."""

    def of(direction: str, kind: Callable[[str], bool] = is_ours) -> Row | None:
        return best(
            (r for r in rows if (r.op, r.size, r.direction) == (goal.op, goal.size, direction)
             and r.dtype == "bfloat16" and not r.sweep),
            kind,
        )  # fmt: skip

    if goal.direction != "backward":
        row = of(goal.direction)
        return (None, "") if row is None else (row.work / row.seconds / PER_UNIT[goal.unit], row.implementation)
    both = of("forward+backward")
    forward = of("forward", lambda name: both is not None and name == both.implementation)
    if both is None or forward is None or both.seconds <= forward.seconds:
        return None, ""
    work, seconds = both.work - forward.work, both.seconds - forward.seconds
    return work / seconds / PER_UNIT[goal.unit], both.implementation


def table(found: Sequence[Verdict]) -> str:
    lines = ["| goal | best known, on this GPU | whose | ours | |", "|---|---:|---|---:|---|"]
    for v in found:
        ours = "" if v.rate is None else f"{v.rate:,.0f} ({v.implementation})"
        lines.append(f"| {v.goal.name} | {v.figure:,.0f} {v.goal.unit} | {v.goal.whose} | {ours} | {v} |")
    return "\n".join(lines) + "\n"


def summary(found: Sequence[Verdict]) -> str:
    """One line."""
    said = [str(v) for v in found]
    parts = [f"{said.count('met')} of {len(found)} goals met"]
    parts += [f"{v.goal.name} {verdict}" for v, verdict in zip(found, said, strict=True) if "missed" in verdict]
    unknown = said.count("not measured")
    return "; ".join(parts + ([f"{unknown} not measured"] if unknown else []))


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.goals", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, metavar="DIR", help="the folder of a GPU's results.json")
    folder = parser.parse_args().results
    found = verdicts(Result.read(folder / FILE) if (folder / FILE).exists() else None)
    print(table(found))
    write_atomic(folder / "goals.md", table(found).encode())
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
