"""What a run says of itself: log.jsonl, live progress, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich import progress as bars

from ..console import console, say
from ..errors import UserError

LOG = "log.jsonl"  # in a run folder: JSON lines


PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


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

    def update(self, record: dict[str, Any], left: float) -> None:
        """``record``: a line of the log; ``left`` in seconds."""
        loss = math.nan if record["loss"] is None else record["loss"]
        line = (
            f"loss {loss:.3f}  lr {record['lr']:.1e}  grad norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,} tokens/s  {record['mfu']:.0%} MFU  "
            f"{record['memory'] / 2**30:.1f} GiB  {timedelta(seconds=int(left))} left"
        )
        step = record["step"]
        self._bar.update(self._task, completed=step, line=line)
        if not console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            say("train", f"step {step}/{self.steps}  {line}")


class Log:
    """What a run says of itself: ``log.jsonl``, the live progress, and TensorBoard where asked.

    Only the first of several processes says it. Numbers that are not finite are null in the file: JSON has none.
    """

    def __init__(self, out: Path, steps: int, tensorboard: bool, first: bool) -> None:
        self.path, self.first = out / LOG, first
        self.progress = Progress(steps)
        self.cut = False  # the last line could not be written whole
        self.board: Any = None
        if tensorboard and self.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--train.tensorboard needs tensorboard: pip install "fastllm[tensorboard]"') from None
            self.board = SummaryWriter(str(out / "tensorboard"))

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+b", buffering=0) if self.first else None
        if self._file and self._file.tell():
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":  # the line that a killed process was writing
                self._file.write(b"\n")
        self.progress.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.__exit__(*exc)
        if self.board:
            self.board.close()
        if self._file:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Add a line, at once."""
        if not self._file:
            return
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(b"\n" * self.cut + json.dumps(numbers).encode() + b"\n")
            self.cut = False
        except OSError as error:
            if not self.cut:
                say("warning", f"can't write {self.path}: {error.strerror}; training goes on")
            self.cut = True
        if self.board:
            for key, value in numbers.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, record["step"])

    def trained(self, record: dict[str, Any], left: float) -> None:
        """Steps since the last time; ``left``: seconds to the end."""
        self.write(record)
        self.progress.update(record, left)

    def validated(self, step: int, loss: float) -> None:
        self.write({"step": step, "validation_loss": loss})
        say("validation", f"step {step}/{self.progress.steps}  loss {loss:.3f}")


def read_log(log: Path) -> list[dict[str, float]]:
    """The records of a log; of a step that was trained again, after a crash or a roll-back, the last ones."""
    kept: list[dict[str, float]] = []
    for line in log.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off when the process was killed
            continue
        of_this_step = []
        while kept and kept[-1]["step"] >= record["step"]:
            old = kept.pop()
            if old["step"] == record["step"] and old.keys() != record.keys():
                of_this_step.append(old)
        kept += [*reversed(of_this_step), record]
    return kept
