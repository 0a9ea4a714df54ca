"""Traces of training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from .. import console

SKIPPED, WARMUP = 10, 2  # steps before the first one that is traced


class StepProfiler:
    """Traces ``steps`` steps of rank 0 for chrome://tracing and Perfetto; with 0 steps it does nothing."""

    def __init__(self, run_dir: Path, steps: int, device: torch.device) -> None:
        self.run_dir, self.steps, self.device = run_dir, steps, device
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Self:
        if self.steps and dist.get_rank() == 0:
            schedule = torch.profiler.schedule(skip_first=SKIPPED, wait=0, warmup=WARMUP, active=self.steps, repeat=1)
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write, record_shapes=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def step(self) -> None:
        """A training step has ended."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        trace, table = self.run_dir / "trace.json.gz", self.run_dir / "profile.txt"
        profile.export_chrome_trace(str(trace))
        averages = profile.key_averages()
        table.write_text(averages.table(sort_by=f"self_{self.device.type}_time_total", row_limit=40))
        console.say("profile", f"{self.steps} steps: {trace}, {table}")
