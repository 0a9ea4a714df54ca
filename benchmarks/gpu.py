"""All that needs a GPU, in one command, or step by step where a machine is lent for ten minutes at a time.

    python -m benchmarks.gpu --out benchmarks/results/<device>
    python -m benchmarks.gpu --out benchmarks/results/<device> --steps build tests

Builds the native module for this GPU, runs ``pytest -m gpu``, runs compute-sanitizer on small shapes, and
times the kernels. Writes into DIR: ``benchmarks.json`` (times, stamped with device, versions and commit),
``README.md`` (what passed, and the table), the plots of benchmarks.sweep, ``training_step.json``, and a log per
step. Exits with 1 where a step failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
    pytest = [python, "-m", "pytest", "-q"]
    times = ["--benchmark-only", f"--benchmark-json={out / 'benchmarks.json'}"]
    return [
        Step("build", install, 100),
        Step("tests", [*pytest, "-m", "gpu", "--maxfail=20", str(ROOT / "tests")], 300),
        Step("memcheck", [sanitizer, "--tool=memcheck", *sanitize], 60),
        Step("racecheck", [sanitizer, "--tool=racecheck", *sanitize], 60),
        Step("benchmarks", [*pytest, str(ROOT / "benchmarks"), *times], 300),
        Step("sweep", [python, "-m", "benchmarks.sweep", "--out", str(out)], 150),
        Step("training", [python, "-m", "benchmarks.training_step", "--preset", "124m", "--out", str(out)], 150),
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
    return Outcome(step.name, verdict, time.monotonic() - start, lines[-1].strip() if lines else "")


def summary(outcomes: list[Outcome], out: Path) -> str:
    from benchmarks import report, timing

    facts = timing.stamp()
    lines = [f"# {facts['device']}", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["| step | verdict | seconds | last line |", "|---|---|---:|---|"]
    lines += [f"| {o.step} | {o.verdict} | {o.seconds:.0f} | {o.last_line[:120]} |" for o in outcomes]
    results = out / "benchmarks.json"
    if results.exists():
        lines += ["", report.read(results)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in steps(Path())], help="these alone")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    import torch

    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: there is no GPU here that PyTorch can use "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); nothing was run",
            file=sys.stderr,
        )
        return 2
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
        (out / "README.md").write_text(summary(list(outcomes.values()), out))
    print((out / "README.md").read_text())
    return 0 if all(o.verdict == "passed" for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
