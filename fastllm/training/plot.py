"""The plot of a run: loss, gradient norm and speed."""

from __future__ import annotations

from pathlib import Path

from ..files import atomic
from .metrics import read_log


def plot(log: Path, path: Path, unigram_loss: float) -> None:
    """Plot the curves of ``log`` to ``path``: loss (and a unigram model's), gradient norm and speed."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    records = read_log(log)
    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    loss, norm, speed = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    curves = (
        (loss, "loss", "training", "-"),
        (loss, "validation_loss", "validation", "o-"),
        (norm, "grad_norm", "gradient norm", "-"),
        (speed, "tokens_per_second", "tokens/s", "-"),
    )
    for axes, key, label, style in curves:
        points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    spikes = [r["step"] for r in records if "spikes" in r]
    for step in spikes:
        norm.axvline(step, color="red", linewidth=0.8)
    loss.axhline(unigram_loss, color="gray", linestyle="--", linewidth=1, label="unigram model, validation")
    loss.set(ylabel="loss (nats per token)", title="Training")
    norm.set(ylabel="gradient norm", yscale="log")
    speed.set(ylabel="tokens/s", xlabel="step", ylim=(0, None))
    for axes in (loss, norm, speed):
        axes.grid(alpha=0.3)
    loss.legend()
    with atomic(path) as part:
        figure.savefig(part, format="png")
