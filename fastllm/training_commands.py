"""The command that shows how a training run went: ``fastllm report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from . import arguments, console


@dataclass(frozen=True)
class ReportArguments:
    """Show how a run went: its settings, and what it scored at each evaluation.

    RUN is a run folder of fastllm train, sft or align, which may still be training. Writes report.md and loss.png into
    it.
    """

    run: tyro.conf.Positional[Path]


ARGUMENTS: dict[str, type] = {"report": ReportArguments}


def report(argv: list[str]) -> int:
    chosen = arguments.parse(ReportArguments, "fastllm report RUN", argv)

    from .training.report import report

    console.console.print(report(chosen.run), end="")
    return 0
