"""All that needs a GPU, in one command of less than ten minutes, or step by step.

    python -m benchmarks.gpu                      into benchmarks/results/<device>/
    python -m benchmarks.gpu --steps build tests  these alone

Builds the native module for this GPU, runs ``pytest -m gpu``, writes the report of ``python -m benchmarks``, times
the training of presets (``python -m benchmarks.scaling``: tokens/s and MFU from 124M to 1.5B), and runs
compute-sanitizer's memcheck and racecheck on small shapes. Last, the backends that were the fastest become the
defaults on this kind of GPU (kernels/measured.py), and the README gets its table. Writes into DIR: report.md,
results.json, plots, steps.md (what passed), and a log per step. A step that runs out of time is stopped, and the next
one runs. Exits with 1 where a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: int  # a limit


@dataclass(frozen=True)
class Outcome:
    step: str
    verdict: str
    seconds: float
    last_line: str


def steps(out: Path) -> list[Step]:
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitize = ["--error-exitcode=9", python, "-m", "benchmarks.small_shapes"]
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(ROOT)]
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", str(ROOT / "tests")]
    return [
        Step("build", install, 80),
        Step("tests", tests, 130),
        Step("report", [python, "-m", "benchmarks", "--seconds", "0.4", "--within", "80", "--out", str(out)], 110),
        Step("scaling", [python, "-m", "benchmarks.scaling", "--seconds", "1", "--out", str(out)], 150),
        Step("memcheck", [sanitizer, "--tool=memcheck", *sanitize], 40),
        Step("racecheck", [sanitizer, "--tool=racecheck", *sanitize], 40),
        Step("defaults", [python, "-m", "benchmarks", "--defaults", "--readme"], 10),
    ]


def run(step: Step, out: Path) -> Outcome:
    """Out of time, a step is interrupted first, as by Ctrl-C: the report then has what was measured."""
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, f"FAILED ({error})", 0.0, "")
        code = _wait(process, step.seconds)
    verdict = f"FAILED (exit {code})" if code else "passed"
    verdict = f"FAILED (not done in {step.seconds} s)" if code is None else verdict
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, verdict, time.monotonic() - start, lines[-1].strip() if lines else "")


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    for number, patience in ((signal.SIGINT, seconds - 8), (signal.SIGKILL, 8), (None, None)):
        try:
            code = process.wait(patience)
            return code if patience == seconds - 8 else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
    return None


def summary(outcomes: list[Outcome]) -> str:
    from .timing import stamp

    facts = stamp()
    lines = [f"# {facts['device']}", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["| step | verdict | seconds | last line |", "|---|---|---:|---|"]
    lines += [f"| {o.step} | {o.verdict} | {o.seconds:.0f} | {o.last_line[:120].replace('|', '/')} |" for o in outcomes]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in steps(Path())], help="these alone")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: there is no GPU here that PyTorch can use "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); nothing was run",
            file=sys.stderr,
        )
        return 2
    from .record import FOLDER
    from .timing import device_name

    out = (arguments.out or FOLDER / device_name()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    done = out / "steps.json"  # of runs before this one too
    outcomes = {o["step"]: Outcome(**o) for o in (json.loads(done.read_text()) if done.exists() else [])}
    for step in steps(out):
        if arguments.steps and step.name not in arguments.steps:
            continue
        print(f"{step.name} ...", flush=True)
        outcome = outcomes[step.name] = run(step, out)
        print(f"{step.name}: {outcome.verdict} in {outcome.seconds:.0f} s: {outcome.last_line}", flush=True)
        # after each step: an end midway loses nothing
        done.write_text(json.dumps([asdict(o) for o in outcomes.values()], indent=1) + "\n")
        (out / "steps.md").write_text(summary(list(outcomes.values())))
    print((out / "steps.md").read_text())
    return 0 if all(o.verdict == "passed" for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
