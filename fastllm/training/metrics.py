"""What a run reports: means over steps, log.jsonl, live progress, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from rich import progress as bars
from torch import Tensor

from ..console import console, say
from ..errors import UserError, pip_install

TASK_PREFIX = "eval."  # of a task's metric in the log: eval.mmlu.acc
LOG = "log.jsonl"  # in a run folder: JSON lines
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
BAR_WIDTH = 12  # characters


class Progress:
    """Live progress on a terminal, as much of it as the width has room for; elsewhere a line every few seconds."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._printed = 0.0
        columns = (bars.TextColumn("step {task.completed}/{task.total}"), bars.BarColumn(bar_width=BAR_WIDTH))
        self._bar = bars.Progress(
            *columns, bars.TextColumn("{task.fields[line]}"), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps, line="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        """``record``: a line of the log."""
        parts = progress_parts(record, seconds_left)
        room = console.width - len(f"step {record['step']}/{self.steps}") - BAR_WIDTH - 3
        self._bar.update(self._task, completed=record["step"], line=fitting(parts, room))
        if not console.is_terminal and time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            say("train", f"step {record['step']}/{self.steps}  {'  '.join(parts)}")


def progress_parts(record: dict[str, Any], seconds_left: float) -> list[str]:
    """What progress shows of a line of the log, the most wanted first."""
    loss = math.nan if record["loss"] is None else record["loss"]
    return [
        f"loss {loss:.3f}",
        f"{timedelta(seconds=int(min(seconds_left, 1e9)))} left",
        f"{record['tokens_per_second']:,} tokens/s",
        f"lr {record['lr']:.1e}",
        f"grad norm {record['grad_norm']:.2f}",
        f"{record['mfu']:.0%} MFU",
        f"{record['memory'] / 2**30:.1f} GiB",
    ]


def fitting(parts: Sequence[str], room: int) -> str:
    """The first of ``parts`` that fit into a line of ``room`` characters, two spaces between them."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > room:
            break
        line += f"  {part}"
    return line


class MeanMetrics:
    """Means of a step's numbers since they were last read: sums on the device, which ``add`` does not wait for."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = ("loss", *names)
        self.sums = torch.zeros(1 + len(self.names), device=device)  # and how many steps they are of
        self.grad_norm = torch.zeros((), device=device)  # of the latest step

    def add(self, loss: Tensor, others: Tensor, grad_norm: Tensor) -> None:
        """One step: loss 0-d, ``others`` ``[names]``. Where one isn't finite, none adds to the means."""
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
        try:
            self._file = open(self.path, "a+b", buffering=0) if self.enabled else None
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}") from None
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

    def validated(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        self.write({"step": step, "validation_loss": loss, **{f"validation_{key}": x for key, x in metrics.items()}})
        others = "".join(f"  {key.replace('_', ' ')} {x:.3f}" for key, x in metrics.items())
        say("validation", f"step {step}/{self.progress.steps}  loss {loss:.3f}{others}")

    def asked(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the run's tasks."""
        self.write({"step": step, **metrics})
        shown = "  ".join(
            f"{name.removeprefix(TASK_PREFIX).replace('.', ' ')} {value:.3f}" for name, value in metrics.items()
        )
        say("tasks", f"step {step}/{self.progress.steps}  {shown}")


def read_log(log: Path) -> list[dict[str, Any]]:
    """The records of a log. Of a step that was trained twice, after a crash or a rollback, the last ones.

    Lines that are no records, such as one that was cut off when the process was killed, are passed over.
    """
    kept: list[dict[str, Any]] = []
    for line in log.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        same_step = []
        while kept and kept[-1]["step"] >= record["step"]:
            old = kept.pop()
            if old["step"] == record["step"] and old.keys() != record.keys():
                same_step.append(old)
        kept += [*reversed(same_step), record]
    return kept
