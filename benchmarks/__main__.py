"""Measure every op and the training step on this machine, against PyTorch and what else is installed.

    python -m benchmarks                          all of it, into benchmarks/results/<device>/
    python -m benchmarks --quick                  two minutes on two CPU cores
    python -m benchmarks --only rms_norm rope     some ops; the others' results in DIR are kept
    python -m benchmarks --within 600             as much as ten minutes allow, what decides first
    python -m benchmarks --compare A.json B.json  what got slower; exits with 1 if something of ours did
    python -m benchmarks --readme                 write the READMEs' tables from the committed results
    python -m benchmarks --defaults               write kernels/measured.py from the committed results

(`fastllm bench` is the same.) Writes report.md, results.json and plots. Results are written after each case; Ctrl-C
ends the run with a report of what there is.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from rich import progress as bars
from rich.console import Console

from fastllm.distributed.mesh import process_group
from fastllm.errors import UserError
from fastllm.files import write_atomic
from fastllm.training.pretrain import keep_freed_memory

from . import accuracy, defaults, peaks, plots, report
from .cases import PYTORCH, Case, Scale, is_ours
from .compare import compare, table
from .record import FILE, FOLDER, Result, Row, best, find
from .runner import run
from .suite import every_case
from .timing import DEVICE, device_name, stamp

console = Console(highlight=False, markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for something of ours that got slower or fails, 2 for an error that the message explains."""
    try:
        return _run(_arguments().parse_args(argv))
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        changes = compare(*(Result.read(path) for path in arguments.compare))
        print(table(changes))
        return 1 if any(c.verdict in ("slower", "fails") for c in changes) else 0
    if arguments.readme or arguments.defaults:
        if not report.README.exists():
            raise UserError("--readme and --defaults write into a checkout of fastllm, and this is none")
        changed = arguments.readme and report.update_readmes(), arguments.defaults and defaults.write()
        print("written" if any(changed) else "nothing to change")
        return 0
    scale = Scale(quick=arguments.quick, seconds=arguments.seconds or (0.6 if arguments.quick else 4.0))
    measure(arguments.out or _default_out(), scale, tuple(arguments.only or ()), arguments.within)
    return 0


def _arguments() -> argparse.ArgumentParser:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "fastllm bench", description=head, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--only", nargs="+", metavar="OP", help='ops, as the report names them ("training step" too)')
    parser.add_argument("--seconds", type=float, help="for each case (default: 4, with --quick 0.6)")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="begin no case after them")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="earlier and later results")
    parser.add_argument("--readme", action="store_true", help="write the README's tables")
    parser.add_argument("--defaults", action="store_true", help="write the GPU backends' defaults")
    return parser


def _default_out() -> Path:
    in_checkout = Path.cwd() == FOLDER.parent.parent
    return (FOLDER if in_checkout else Path("runs", "bench")) / device_name()


def measure(out: Path, scale: Scale, only: tuple[str, ...] = (), within: float = math.inf) -> None:
    result, began = Result(stamp() | {"timed": "in turns"}), time.monotonic()
    cases = every_case(scale)
    known = dict.fromkeys(case.op for case in cases)
    unknown = [op for op in only if op not in known]
    if unknown:
        raise UserError(f"--only: there is no {', '.join(unknown)} to measure; choose from {', '.join(known)}")
    cases = [case for case in cases if not only or case.op in only]
    if only and (out / FILE).exists():
        result.keep(Result.read(out / FILE))
    if DEVICE.type == "cpu":
        _back_memory()
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=20), bars.MofNCompleteColumn(),
               bars.TimeRemainingColumn())  # fmt: skip
    try:
        with process_group(DEVICE), bars.Progress(*columns, console=console, transient=True) as display:
            task = display.add_task("the machine's limits", total=len(cases) + 1)
            result.peaks = peaks.measure(0.3 if scale.quick else 1.0)
            display.update(task, description="errors against float64")
            errors = list(accuracy.measure(only))
            result.errors = [error for error in result.errors if error.op not in only] + errors
            for number, case in enumerate(cases):
                if time.monotonic() - began > within:
                    result.stamp["left out"] = "; ".join(dict.fromkeys(_named(case) for case in cases[number:]))
                    console.print(f"no time left for {result.stamp['left out']}")
                    break
                display.update(task, advance=1, description=case.title)
                rows = run(case, scale.seconds)
                result.add(rows)
                result.write(out / FILE)
                console.print(f"{time.monotonic() - began:5.0f} s  {case.title}: {_summary(rows)}")
            else:
                result.forget(only)
    except KeyboardInterrupt:
        if not result.rows:
            console.print("interrupted before anything was measured")
            return
        console.print("interrupted: the report has what was measured")
    finish(result, out)
    console.print(f"{out / 'report.md'} in {time.monotonic() - began:.0f} s")


def finish(result: Result, out: Path) -> None:
    """Write the result, its pictures and its report."""
    result.rows.sort(key=lambda row: result.ops.index(row.op))
    result.write(out / FILE)
    write_atomic(out / "report.md", report.report(result, plots.draw(result, out)).encode())


def _named(case: Case) -> str:
    return f"{case.op} by {case.sweep}" if case.sweep else case.op


def _summary(rows: list[Row]) -> str:
    ours, base = best(rows, is_ours), find(rows, PYTORCH)
    if base and ours:
        times = base.seconds / ours.seconds
        return f"{base.seconds * 1e3:.3g} ms PyTorch, {ours.seconds * 1e3:.3g} ours, {times:.2f} times as fast"
    failed = [f"{r.implementation}: {r.error}" for r in rows if r.error]
    return "; ".join(failed) or ", ".join(f"{r.implementation} {r.seconds * 1e3:.3g} ms" for r in rows)


def _back_memory() -> None:
    """A virtual machine's host hands out pages slowly the first time: write to a quarter of the memory once."""
    if hasattr(os, "sysconf"):
        torch.ones(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, dtype=torch.int8)
    if sys.platform == "linux":
        keep_freed_memory()


if __name__ == "__main__":
    sys.exit(main())
