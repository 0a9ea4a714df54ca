"""The plot of a run: loss, gradient norm, speed, and what else its log holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import atomic
from .metrics import TASK_PREFIX, read_log


class Panel(NamedTuple):
    """Curves that share axes: their keys in the log, with labels and styles."""

    ylabel: str
    curves: tuple[tuple[str, str, str], ...]


LOSS = Panel("loss", (("loss", "training", "-"), ("validation_loss", "validation", "o-")))
NORM = Panel("gradient norm", (("grad_norm", "gradient norm", "-"),))
SPEED = Panel("tokens/s", (("tokens_per_second", "tokens/s", "-"),))
LOGARITHMIC = (NORM,)


def task_panel(records: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """The panel of the tasks that the model was asked in training, where it was."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith(TASK_PREFIX))
    if keys:
        curves = tuple((key, key.removeprefix(TASK_PREFIX).replace(".", " "), "o-") for key in keys)
        yield Panel("tasks", curves)


def plot(log: Path, path: Path, panels: Sequence[Panel] = (), *, unigram_loss: float | None = None) -> None:
    """Plot the curves of ``log`` to ``path``: loss (and a unigram model's), ``panels``, gradient norm and speed."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    records = read_log(log)
    panels = (*panels, *task_panel(records))
    shown = (LOSS, *panels, NORM, SPEED)
    figure = Figure(figsize=(8, 8 + 2 * len(panels)), dpi=120, layout="constrained")
    all_axes = figure.subplots(len(shown), sharex=True, height_ratios=(3, *(2 for _ in panels), 1, 1))
    for axes, panel in zip(all_axes, shown, strict=True):
        for key, label, style in panel.curves:
            points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
        axes.set(ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        if panel in LOGARITHMIC and any(max(line.get_ydata()) > 0 for line in axes.lines):
            axes.set(yscale="log")
        elif len(panel.curves) > 1 and axes.lines:
            axes.legend()
    loss, norm, speed = all_axes[0], all_axes[-2], all_axes[-1]
    for step in (r["step"] for r in records if "spikes" in r):
        norm.axvline(step, color="red", linewidth=0.8)
    if unigram_loss is not None:
        loss.axhline(unigram_loss, color="gray", linestyle="--", linewidth=1, label="unigram model, validation")
        loss.legend()
    loss.set(ylabel="loss (nats per token)" if unigram_loss is not None else "loss", title="Training")
    speed.set(xlabel="step", ylim=(0, None))
    with atomic(path) as part:
        figure.savefig(part, format="png")
