"""All that needs a GPU, in one command and within eight minutes.

    python -m benchmarks.gpu --out benchmarks/results/<device>

Builds the native module for this GPU, runs ``pytest -m gpu``, runs compute-sanitizer on small shapes, and
times the kernels. Writes into DIR: ``benchmarks.json`` (times, stamped with device, versions and commit),
``README.md`` (what passed, and the table), the plot of benchmarks.sweep, and a log per step. Exits with 1 where
a step failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: int  # a limit: all together stay under eight minutes


@dataclass(frozen=True)
class Outcome:
    step: Step
    verdict: str
    seconds: float
    last_line: str


def steps(out: Path) -> list[Step]:
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitize = ["--error-exitcode=9", python, "-m", "benchmarks.small_shapes"]
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(ROOT)]
    pytest = [python, "-m", "pytest", "-q"]
    times = ["--benchmark-only", f"--benchmark-json={out / 'benchmarks.json'}"]
    return [
        Step("build", install, 100),
        Step("tests", [*pytest, "-m", "gpu", "--maxfail=20", str(ROOT / "tests")], 100),
        Step("memcheck", [sanitizer, "--tool=memcheck", *sanitize], 35),
        Step("racecheck", [sanitizer, "--tool=racecheck", *sanitize], 35),
        Step("benchmarks", [*pytest, str(ROOT / "benchmarks"), *times], 150),
        Step("sweep", [python, "-m", "benchmarks.sweep", "--out", str(out)], 60),
    ]


def run(step: Step, out: Path) -> Outcome:
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=step.seconds
            ).returncode
            verdict = "passed" if code == 0 else f"FAILED (exit {code})"
        except subprocess.TimeoutExpired:
            verdict = f"FAILED (not done in {step.seconds} s)"
        except OSError as error:
            verdict = f"FAILED ({error})"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step, verdict, time.monotonic() - start, lines[-1].strip() if lines else "")


def summary(outcomes: list[Outcome], out: Path) -> str:
    from benchmarks import report, timing

    facts = timing.stamp()
    lines = [f"# {facts['device']}", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["| step | verdict | seconds | last line |", "|---|---|---:|---|"]
    lines += [f"| {o.step.name} | {o.verdict} | {o.seconds:.0f} | {o.last_line[:120]} |" for o in outcomes]
    results = out / "benchmarks.json"
    if results.exists():
        lines += ["", report.read(results)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    out = parser.parse_args().out.resolve()
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: there is no GPU here that PyTorch can use "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); nothing was run",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps(out):
        print(f"{step.name} ...", flush=True)
        outcomes.append(run(step, out))
        print(
            f"{step.name}: {outcomes[-1].verdict} in {outcomes[-1].seconds:.0f} s: {outcomes[-1].last_line}", flush=True
        )
        (out / "README.md").write_text(summary(outcomes, out))  # after each step: an end midway loses nothing
    print((out / "README.md").read_text())
    return 0 if all(o.verdict == "passed" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
