"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastllm.files import atomic

from .cases import COPY, DROP_IN, LADDER, OURS, PER_UNIT, PYTORCH, is_ours, is_theirs
from .record import Result, Row, best, find

COLOURS = {OURS: "#0b7a75", PYTORCH: "#9aa5b1", "other": ("#d9822b", "#6c5b7b", "#4a90d9", "#c0392b", "#7f8c4d")}


def draw(result: Result, out: Path) -> list[str]:
    """Writes what the result has the numbers for; the names of the pictures."""
    from matplotlib.figure import Figure

    drawn = []
    for name, plot in PLOTTERS.items():
        figure = Figure(dpi=110, layout="constrained")
        if plot(result, figure):
            figure.text(0.99, 0.01, _stamp(result), ha="right", va="bottom", fontsize=7, color="#667")
            figure.get_layout_engine().set(rect=(0, 0.025, 1, 0.975))
            with atomic(out / f"{name}.png") as part:
                figure.savefig(part, format="png", facecolor="white")
            drawn.append(name)
    return drawn


def _stamp(result: Result) -> str:
    return f"{result.stamp['device']}, torch {result.stamp['torch']}, {result.stamp['commit']}"


def _speedup(result: Result, figure: Any) -> bool:
    """Bars from PyTorch's time to our fastest backend's, and a mark for the fastest of all that is not ours."""
    bars = []
    for rows in result.by_case().values():
        ours, base, theirs = best(rows, is_ours), find(rows, PYTORCH), best(rows, is_theirs)
        if ours and base and theirs and rows[0].op not in (LADDER, DROP_IN):
            label = f"{rows[0].op}  {rows[0].size}  {rows[0].dtype}{'' if 'back' in rows[0].direction else ', forward'}"
            bars.append((label, base.seconds / ours.seconds, base.seconds / theirs.seconds))
    if not bars:
        return False
    figure.set_size_inches(9, 1.2 + 0.24 * len(bars))
    axis = figure.subplots()
    labels, values, others = zip(*reversed(bars), strict=True)
    colours = [COLOURS[OURS] if value >= 1 else COLOURS["other"][0] for value in values]
    axis.barh(labels, [value - 1 for value in values], left=1, color=colours, height=0.72)
    for at, (value, other) in enumerate(zip(values, others, strict=True)):
        axis.text(max(value, other, 1.0) * 1.04, at, f"{value:.2f}", va="center", fontsize=8)
    axis.scatter(others, labels, marker="|", s=90, linewidths=2, color="#111", zorder=3,
                 label="the fastest of PyTorch, torch.compile and others")  # fmt: skip
    axis.axvline(1, color="#333", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(min(0.9, *values) * 0.9, max(*values, *others) * 1.4)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}×")
    axis.xaxis.set_minor_formatter(lambda v, _: "")
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.01)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("fastllm: times as fast as PyTorch")
    return True


def _curves(op: str, sweeps: dict[str, str]) -> Callable[[Result, Any], bool]:
    """Time and memory against each size that was swept."""

    def plot(result: Result, figure: Any) -> bool:
        columns = {}
        for sweep, label in sweeps.items():
            rows = [r for r in result.rows if r.op == op and r.sweep == sweep and not r.error]
            if rows:
                columns[label] = rows
        if not columns:
            return False
        figure.set_size_inches(1 + 5 * len(columns), 7)
        axes = figure.subplots(2, len(columns), sharex="col", squeeze=False)
        for column, (label, rows) in enumerate(columns.items()):
            for name, colour in _colours(rows).items():
                mine = sorted((r for r in rows if r.implementation == name), key=lambda r: r.at)
                at = [r.at for r in mine]
                style = {"color": colour, "marker": "o", "markersize": 4, "label": name}
                style |= {"linewidth": 2.2 if name.startswith(OURS) else 1.3}
                style |= {"linestyle": "--", "zorder": 3} if name == PYTORCH else {}  # others may lie on it
                spread = [[(r.seconds - r.low) * 1e3 for r in mine], [(r.high - r.seconds) * 1e3 for r in mine]]
                axes[0, column].errorbar(at, [r.seconds * 1e3 for r in mine], spread, capsize=2, **style)
                if all(r.memory for r in mine):
                    axes[1, column].plot(at, [r.memory / 2**20 for r in mine], **style)
            axes[1, column].set_xlabel(label)
            for axis in axes[:, column]:
                _log(axis)
        axes[0, 0].set_ylabel("ms")
        axes[1, 0].set_ylabel("peak memory, MiB")
        axes[0, 0].legend(fontsize=8, frameon=False)
        first = next(iter(columns.values()))[0]
        figure.suptitle(f"{op}, {first.direction}, {first.dtype}")
        return True

    return plot


def _bandwidth(result: Result, figure: Any) -> bool:
    rows = [r for r in result.rows if r.op == "rms_norm" and r.sweep and not r.error]
    if not rows:
        return False
    figure.set_size_inches(7.5, 4.5)
    axis = figure.subplots()
    for name, colour in _colours(rows).items():
        mine = sorted((r for r in rows if r.implementation == name and name != COPY), key=lambda r: r.at)
        if mine:
            rates = [r.work / r.seconds / PER_UNIT[r.unit] for r in mine]
            axis.plot([r.at for r in mine], rates, marker="o", markersize=4, color=colour, label=name)
    if result.peaks:
        axis.axhline(result.peaks["copy"], color="#333", linestyle="--", linewidth=1, label="copy, this machine")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_ylim(bottom=0)
    axis.set(xlabel="columns", ylabel="GB/s", title=f"rms_norm, {rows[0].direction}, {rows[0].dtype}")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return True


def _ladder(result: Result, figure: Any) -> bool:
    groups = [rows for rows in result.by_case().values() if rows[0].op in (LADDER, DROP_IN)]
    groups = [[r for r in rows if not r.error] for rows in groups]
    if not any(groups):
        return False
    figure.set_size_inches(9, 1.0 + sum(0.7 + 0.36 * len(rows) for rows in groups))
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[1 + len(rows) for rows in groups])
    for axis, rows in zip(axes[:, 0], groups, strict=True):
        upwards = rows[::-1]
        low, speeds, high = ([r.work / t for r, t in zip(upwards, times, strict=True)] for times in zip(
            *((r.high, r.seconds, r.low) for r in upwards), strict=True))  # fmt: skip
        spread = [[s - b for s, b in zip(speeds, low, strict=True)], [t - s for s, t in zip(speeds, high, strict=True)]]
        ours = [is_ours(r.implementation) for r in upwards]
        names = [r.implementation for r in upwards]
        axis.barh(names, speeds, xerr=spread, color=[COLOURS[OURS] if o else COLOURS[PYTORCH] for o in ours],
                  error_kw={"elinewidth": 1, "ecolor": "#444"})  # fmt: skip
        for at, (speed, top) in enumerate(zip(speeds, high, strict=True)):
            label = f"{speed:,.0f}  ({speed / speeds[-1]:.2f}×)"
            axis.text(max(speed, top) + max(speeds) * 0.01, at, label, va="center", fontsize=8)
        axis.set_xlim(0, max(*speeds, *high) * 1.25)
        axis.set_title(f"{rows[0].op}: {rows[0].size}, {rows[0].dtype}, tokens/s", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=9)
    return True


def _colours(rows: list[Row]) -> dict[str, str]:
    names, others = dict.fromkeys(r.implementation for r in rows), iter(COLOURS["other"] * 3)
    fixed = {OURS: COLOURS[OURS], PYTORCH: COLOURS[PYTORCH]}
    return {n: fixed.get(n.split(",")[0].split(" ")[0]) or next(others) for n in names}


def _log(axis: Any) -> None:
    for scale, formatter in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log", base=2)
        formatter.set_major_formatter(lambda v, _: f"{v:g}" if math.log2(v) >= -4 else f"{v:.1g}")
    axis.grid(True, which="major", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


PLOTTERS: dict[str, Callable[[Result, Any], bool]] = {
    "speedup": _speedup,
    "attention": _curves("flash_attention", {"tokens": "tokens"}),
    "linear_cross_entropy": _curves("linear_cross_entropy", {"classes": "classes", "tokens": "tokens"}),
    "rms_norm": _bandwidth,
    "ladder": _ladder,
}
