"""What a person sees of a run: lines, live progress, and the plot of the loss."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Self

from rich import progress as bars
from rich.console import Console

from .files import atomic

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal

console = Console(highlight=False, markup=False, soft_wrap=True)


def say(label: str, text: str) -> None:
    """A line with a label; further lines of ``text`` stand below it."""
    console.print(f"{label:<12}" + text.replace("\n", "\n" + 12 * " "))


class Progress:
    """Live progress on a terminal; elsewhere a line now and then."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._printed = 0.0
        columns = (
            bars.TextColumn("step {task.completed}/{task.total}"),
            bars.BarColumn(bar_width=20),
            bars.TextColumn("{task.fields[line]}"),
        )
        self._bar = bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=steps, line="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, lr: float, norm: float, speed: float, left: float) -> None:
        """``speed`` in tokens per second, ``left`` in seconds."""
        line = (
            f"loss {loss:.3f}  lr {lr:.1e}  grad norm {norm:.2f}  {speed:,.0f} tokens/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
        self._bar.update(self._task, completed=step, line=line)
        if not console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            say("train", f"step {step}/{self.steps}  {line}")

    def validated(self, step: int, loss: float) -> None:
        say("validation", f"step {step}/{self.steps}  loss {loss:.3f}")


def plot(log: Path, path: Path, unigram_loss: float) -> None:
    """Draw the curves in ``log`` (JSON lines), with the loss of a unigram model beside them."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    axes = (figure := Figure(figsize=(8, 5), dpi=120, layout="constrained")).subplots()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.5)
    axes.axhline(unigram_loss, color="gray", linestyle="--", linewidth=1, label="unigram model, validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as part:
        figure.savefig(part, format="png")
