"""All that needs a GPU, in one command of less than ten minutes, or in two of less than five.

    python -m benchmarks.gpu                      into benchmarks/results/<device>/
    python -m benchmarks.gpu --half 1             the build, small shapes, tests, tiles: 280 seconds at most
    python -m benchmarks.gpu --half 2             the report, scaling, goals, compute-sanitizer: as long
    python -m benchmarks.gpu --steps build tests  these alone
    python -m benchmarks.gpu --tar FILE           and all that is worth keeping in FILE (where OUT is set, $OUT/gpu.tgz)

Builds the native module for this GPU; runs every kernel on small shapes, each judged by itself; runs ``pytest -m gpu``;
times the Triton attention kernels over tiles. Then writes the report of ``python -m benchmarks``, trains presets
(``python -m benchmarks.scaling``), compares with the field's best figures (goals.py), and runs compute-sanitizer. The
fastest backends and tiles become the defaults on this kind of GPU (kernels/measured.py), and the README gets its table.

A step that runs out of time is interrupted, then killed, and the next one runs; time that a step leaves goes to those
behind it. Results, steps.md and the tar are written after each step. Exits with 1 where a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HALF = 280.0  # seconds
GRACE = 8.0  # between the interruption and the end
LEAST = 4.0  # for less no step is begun
LIMIT = "{seconds}"  # in a command: how long it may begin something new
WRITTEN = ("kernels/measured.py", "README.md", "benchmarks/README.md")  # beside the folder of the results
MOST_LOG = 300_000  # bytes of a log in the tar, its end


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float  # the least that it has, if it needs them


@dataclass(frozen=True)
class Outcome:
    step: str
    verdict: str
    seconds: float
    last_line: str


def halves(out: Path) -> tuple[list[Step], list[Step]]:
    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", name, *arguments]

    tests = ["-q", "-m", "gpu", "--maxfail=20", str(ROOT / "tests")]
    tests += ["-n", "12"] if importlib.util.find_spec("xdist") else []
    tests += ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitized = ["--error-exitcode=9", *module("benchmarks.small_shapes", "--here")]
    build = Step("build", module("benchmarks.build"), 66)
    defaults = Step("defaults", module("benchmarks", "--defaults", "--readme"), 14)
    first = [
        build,
        Step("small_shapes", module("benchmarks.small_shapes", "--out", str(out)), 52),
        Step("tests", module("pytest", *tests), 78),
        Step("tiles", module("benchmarks.tiles", "--compile-for", "30", "--out", str(out)), 58),
        defaults,
    ]
    second = [
        build,
        Step("report", module("benchmarks", "--seconds", "0.4", "--within", LIMIT, "--out", str(out)), 76),
        Step("scaling", module("benchmarks.scaling", "--seconds", "1", "--out", str(out)), 48),
        defaults,
        Step("goals", module("benchmarks.goals", str(out)), 14),
        # each tensor with memory of its own: an access beside it is not one of the allocator's
        Step("memcheck", ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool=memcheck", *sanitized], 26),
        Step("racecheck", [sanitizer, "--tool=racecheck", *sanitized], 24),
    ]
    return first, second


def run(step: Step, out: Path, limit: float) -> Outcome:
    """Out of time, a step is interrupted first, as by Ctrl-C: it writes what was measured."""
    start = time.monotonic()
    log = out / f"{step.name}.log"
    command = [word.replace(LIMIT, f"{max(10.0, limit - 30):.0f}") for word in step.command]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, f"FAILED ({error})", 0.0, "")
        try:
            code = _wait(process, limit)
        except BaseException:
            _signal(process, signal.SIGKILL)
            raise
    verdict = f"FAILED (exit {code})" if code else "passed"
    verdict = f"FAILED (not done in {limit:.0f} s)" if code is None else verdict
    return Outcome(step.name, verdict, time.monotonic() - start, (_lines(log) or [""])[-1])


def _lines(log: Path) -> list[str]:
    text = log.read_text(errors="replace") if log.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit code; None where time is out."""
    grace = min(GRACE, limit / 4)
    try:
        return process.wait(limit - grace)
    except subprocess.TimeoutExpired:
        pass
    for number, patience in ((signal.SIGINT, grace), (signal.SIGKILL, 5.0)):
        _signal(process, number)
        with suppress(subprocess.TimeoutExpired):  # of what can't even be killed: the next step runs beside it
            process.wait(patience)
            break
    return None


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


# ---- what is left for the reader ----


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """steps.md: what passed, which goals are met, what to commit."""
    from .timing import stamp

    facts = stamp()
    lines = [f"# {facts['device']}", "", ", ".join(f"{k} {v}" for k, v in facts.items()), ""]
    lines += ["| step | verdict | seconds | last line |", "|---|---|---:|---|"]
    lines += [f"| {o.step} | {o.verdict} | {o.seconds:.0f} | {o.last_line[:120].replace('|', '/')} |" for o in outcomes]
    goals = out / "goals.md"
    lines += ["", *(goals.read_text().splitlines() if goals.exists() else ["The goals (goals.py): not measured yet."])]
    return "\n".join([*lines, "", advice(outcomes, out)]) + "\n"


def advice(outcomes: Sequence[Outcome], out: Path) -> str:
    """The last line: the goals, and what to commit."""
    goals = next((o.last_line for o in outcomes if o.step == "goals" and o.verdict == "passed"), "not measured")
    failed = ", ".join(o.step for o in outcomes if o.verdict != "passed")
    folder = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    steps = f"FAILED: {failed} (see the logs)" if failed else "every step passed"
    return f"{steps}. Goals: {goals}. To commit: {' '.join([str(folder), *WRITTEN])}"


def write_tar(out: Path, path: Path) -> None:
    """Results, logs and what was written beside them, as they lie in the checkout: `tar xzf` there brings them home."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = sorted(p for p in out.iterdir() if p.is_file() and not p.name.startswith("."))
    with tarfile.open(part, "w:gz") as tar:
        for file in (*results, *map(ROOT.joinpath, WRITTEN)):
            name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else Path(out.name, file.name)
            content = file.read_bytes()
            member = tarfile.TarInfo(str(name))
            content = content[-MOST_LOG:] if file.suffix == ".log" else content
            member.size, member.mtime = len(content), int(file.stat().st_mtime)
            tar.addfile(member, io.BytesIO(content))
    os.replace(part, path)


class Record:
    """What was done, on disk after each step: an end midway loses nothing."""

    def __init__(self, out: Path, tar: Path | None, *, afresh: bool) -> None:
        self.out, self.tar, self.file = out, tar, out / "steps.json"
        known = [] if afresh or not self.file.exists() else json.loads(self.file.read_text())
        self.outcomes = {o["step"]: Outcome(**o) for o in known}

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step] = outcome
        found = list(self.outcomes.values())
        self.file.write_text(json.dumps([asdict(o) for o in found], indent=1) + "\n")
        for what in ("steps.md", "the tar"):
            try:
                if what == "steps.md":
                    (self.out / what).write_text(summary(found, self.out))
                elif self.tar is not None:
                    write_tar(self.out, self.tar)
            except Exception as error:  # the steps are worth more
                print(f"{what} can't be written: {type(error).__name__}: {error}", flush=True)


def run_steps(steps: Sequence[Step], record: Record, end: float) -> bool:
    """Whether all passed. Each has its own seconds and what those before it left, up to ``end`` (time.monotonic)."""
    passed = True
    for number, step in enumerate(steps):
        limit = end - time.monotonic() - sum(later.seconds for later in steps[number + 1 :])
        print(f"{step.name} (at most {limit:.0f} s) ...", flush=True)
        outcome = (
            run(step, record.out, limit) if limit > LEAST else Outcome(step.name, "FAILED (no time left)", 0.0, "")
        )
        record.add(outcome)
        print(f"  {outcome.verdict} in {outcome.seconds:.0f} s: {outcome.last_line[:160]}", flush=True)
        if outcome.verdict != "passed":
            passed = False
            print(
                "\n".join(f"  | {line[:200]}" for line in _lines(record.out / f"{step.name}.log")[-12:-1]), flush=True
            )
    return passed


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=head, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    names = list(dict.fromkeys(step.name for half in halves(Path()) for step in half))
    tar = Path(os.environ["OUT"], "gpu.tgz") if os.environ.get("OUT") else None
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--tar", type=Path, metavar="FILE", default=tar, help="where all of them go in one")
    parser.add_argument("--half", type=int, choices=(1, 2), help="this half alone")
    parser.add_argument("--steps", nargs="+", choices=names, help="these alone")
    arguments = parser.parse_args(argv)
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
    chosen = halves(out)[arguments.half - 1 : arguments.half] if arguments.half else halves(out)
    record = Record(out, arguments.tar, afresh=not arguments.steps and arguments.half != 2)
    passed, end = True, begun - LEAST
    for half in chosen:
        end += HALF
        steps = [step for step in half if not arguments.steps or step.name in arguments.steps]
        if half is not chosen[0]:
            steps = [step for step in steps if step.name != "build"]
        passed = run_steps(steps, record, end) and passed
    if arguments.tar:
        print(f"{arguments.tar} holds it all: tar xzf it in the checkout")
    written = out / "steps.md"
    print(written.read_text().strip() if written.exists() else advice(list(record.outcomes.values()), out))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
