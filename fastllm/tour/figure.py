"""The picture of the report: what the filters dropped, how the model learnt, what it can do before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic
from .measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#b8c4d6", "#2f5d9b")


def draw(path: Path, dropped: Mapping[str, int], log: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> None:
    """Write the picture.

    Args:
        dropped: documents by the filter that dropped them.
        log: of pre-training.
        measures: the first one of pre-training, the others of tuning.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    (filters, loss), (knowledge, tuning) = figure.subplots(2, 2, width_ratios=(1, 1.6))
    filters.barh(list(dropped), list(dropped.values()), color="#a8503c")
    filters.invert_yaxis()
    filters.set(xlabel="documents", title="dropped from the raw sources")

    for key, label, style in (("loss", "training", "-"), ("validation_loss", "held-out documents", "o-")):
        points = [(r["step"], r[key]) for r in log if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
        if points:
            loss.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    loss.set(xlabel="step", ylabel="nats per token", title="pre-training", ylim=(0, None))
    loss.grid(alpha=0.3)
    loss.legend()

    _bars(knowledge, measures[:1], "pre-training: what it knows")
    knowledge.axvline(0.25, color="gray", linestyle="--", linewidth=1)
    knowledge.annotate("chance", (0.26, 0.5), color="gray", fontsize=8)
    _bars(tuning, measures[1:], "tuning: what it does")
    with atomic(path) as part:
        figure.savefig(part, format="png")


def _bars(axes: Axes, measures: Sequence[Measure], title: str) -> None:
    """A group of bars for each measure: a bar for each model, with its interval."""
    models = list(measures[0].shares)
    height = 0.8 / len(models)
    for number, model in enumerate(models):
        shares = [measure.shares[model] for measure in measures]
        values = [share.value for share in shares]
        off = [[max(0.0, s.value - s.low) for s in shares], [max(0.0, s.high - s.value) for s in shares]]
        places = [place + (number - (len(models) - 1) / 2) * height for place in range(len(measures))]
        axes.barh(places, values, height, xerr=off, label=model, color=COLORS[number], ecolor="dimgray", capsize=2)
    axes.set_yticks(range(len(measures)), [_folded(measure.about) for measure in measures], fontsize=8)
    axes.set(xlim=(0, 1.02), title=title, xlabel="share of the answers, with its 95 % interval")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def _folded(text: str) -> str:
    """In lines that fit beside the bars."""
    import textwrap

    return textwrap.fill(text, 26)
