"""What a run reports: means over steps, log.jsonl, live progress, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from rich import progress as bars
from torch import Tensor

from ..console import console, say
from ..errors import UserError, pip_install

LOG = "log.jsonl"  # in a run folder: JSON lines


PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Live progress on a terminal; elsewhere a line every few seconds."""

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

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        """``record``: a line of the log."""
        loss = math.nan if record["loss"] is None else record["loss"]
        line = (
            f"loss {loss:.3f}  lr {record['lr']:.1e}  grad norm {record['grad_norm']:.2f}  "
            f"{record['tokens_per_second']:,} tokens/s  {record['mfu']:.0%} MFU  "
            f"{record['memory'] / 2**30:.1f} GiB  {timedelta(seconds=int(seconds_left))} left"
        )
        step = record["step"]
        self._bar.update(self._task, completed=step, line=line)
        if not console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            say("train", f"step {step}/{self.steps}  {line}")


class MeanMetrics:
    """Means of a step's numbers since they were last read: sums on the device, which ``add`` does not wait for."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = ("loss", *names)
        self.sums = torch.zeros(1 + len(self.names), device=device)  # and how many steps they are of
        self.grad_norm = torch.zeros((), device=device)  # of the latest step

    def add(self, loss: Tensor, others: Tensor, grad_norm: Tensor) -> None:
        """One step: loss 0-d, ``others`` ``[names]``. Those that are not finite can't be in a mean: they add nothing."""
        step = torch.cat((loss[None], others, torch.ones_like(loss)[None]))
        self.sums += torch.where(step.isfinite().all(), step, 0.0)
        self.grad_norm = grad_norm

    def pop(self) -> dict[str, float | None]:
        """The means (None where no step's numbers were finite) and the latest gradient norm. Waits for the device."""
        *sums, count, grad_norm = torch.cat((self.sums, self.grad_norm[None])).tolist()
        self.sums.zero_()
        means = {name: value / count if count else None for name, value in zip(self.names, sums, strict=True)}
        return {**means, "grad_norm": grad_norm}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the tensors themselves."""
        return {"sums": self.sums, "grad_norm": self.grad_norm}


class RunLog:
    """The log of a run: ``log.jsonl``, live progress, and TensorBoard where asked.

    Only rank 0 is ``enabled``. Numbers that are not finite are null in the file: JSON has none.
    """

    def __init__(self, run_dir: Path, steps: int, tensorboard: bool, enabled: bool) -> None:
        self.path, self.enabled = run_dir / LOG, enabled
        self.progress = Progress(steps)
        self._line_is_torn = False  # the last line could not be written completely
        self.board: Any = None
        if tensorboard and enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(f"--train.tensorboard needs tensorboard: {pip_install('tensorboard')}") from None
            self.board = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+b", buffering=0) if self.enabled else None
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
        """Append a line at once."""
        if not self._file:
            return
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(b"\n" * self._line_is_torn + json.dumps(numbers).encode() + b"\n")
            self._line_is_torn = False
        except OSError as error:
            if not self._line_is_torn:
                say("warning", f"can't write {self.path}: {error.strerror}; training continues")
            self._line_is_torn = True
        if self.board:
            for key, value in numbers.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, record["step"])

    def trained(self, record: dict[str, Any], seconds_left: float) -> None:
        """Steps since the last line."""
        self.write(record)
        self.progress.update(record, seconds_left)

    def validated(self, step: int, loss: float) -> None:
        self.write({"step": step, "validation_loss": loss})
        say("validation", f"step {step}/{self.progress.steps}  loss {loss:.3f}")


def read_log(log: Path) -> list[dict[str, float]]:
    """The records of a log. Of a step that was trained twice, after a crash or a rollback, the last ones."""
    kept: list[dict[str, float]] = []
    for line in log.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off when the process was killed
            continue
        same_step = []
        while kept and kept[-1]["step"] >= record["step"]:
            old = kept.pop()
            if old["step"] == record["step"] and old.keys() != record.keys():
                same_step.append(old)
        kept += [*reversed(same_step), record]
    return kept
