"""Named jobs in processes of their own, so that a broken CUDA context, a crash or a hang costs one job.

The parent starts a child with the names of the jobs left, the child prints a line of JSON for each, and whatever ends
the child is the error of the job in hand: the next child begins with the one after it.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .runner import one_line

ROOT = Path(__file__).resolve().parent.parent
START = 60.0  # seconds in which a process imports PyTorch and reaches the GPU, beside others
READY = "ready"
_CHILDREN: set[subprocess.Popen[str]] = set()  # those that run
BROKEN = 3  # a child's exit code: no more jobs can run in it


@dataclass(frozen=True)
class Outcome:
    name: str
    error: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)  # what the job returned


def work(jobs: Mapping[str, Callable[[], dict[str, Any] | None]], names: Sequence[str]) -> int:
    """The child: runs the jobs of these names; its exit code."""
    print(READY, flush=True)
    for name in names:
        start, error, found = time.monotonic(), "", None
        try:
            found = jobs[name]()
            _synchronize()
        except Exception as failure:
            error = one_line(failure)
        line = {"name": name, "error": error, "seconds": time.monotonic() - start, "found": found or {}}
        print(json.dumps(line), flush=True)
        if error:
            try:
                _synchronize()
            except Exception:  # the context is lost
                return BROKEN
    return 0


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(command: Sequence[str], names: Sequence[str], patience: float, start: float = START) -> Iterator[Outcome]:
    """The parent: ``command`` and the names make a child. A job without an answer in ``patience`` seconds is given up;
    a child that does not begin in ``start`` seconds, all of them."""
    left = list(names)
    while left:
        child = subprocess.Popen([*command, *left], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        _CHILDREN.add(child)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
        limit, ready = start, False
        try:
            while left and (line := lines.get(timeout=limit)) is not None:
                ready = ready or line.strip() == READY
                limit = patience if ready else start
                if line.startswith('{"name"'):  # and not what a library prints
                    yield Outcome(**json.loads(line))
                    left.pop(0)
            if not left:
                return  # how it ends, and whether, is nobody's concern
            code, what = child.wait(), "the process ended"
        except queue.Empty:
            child.kill()
            code, what = child.wait(), f"no answer in {limit:.0f} s: killed"
        finally:
            child.kill()
            child.wait()
            _CHILDREN.discard(child)
        if code == -signal.SIGINT:
            return
        lost = left[:1] if ready else left[:]
        if code != BROKEN:
            yield from (Outcome(name, f"{what} (exit {code})") for name in lost)
            del left[: len(lost)]


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in child.stdout or ():
        lines.put(line)
    lines.put(None)


def shares(names: Sequence[str], most: int) -> list[Sequence[str]]:
    """Dealt out to as many children, neighbours to different ones."""
    return [names[n::most] for n in range(min(most, len(names)))]


def run_all(groups: Sequence[Sequence[str]], command: Sequence[str], patience: float) -> Generator[Outcome, None, None]:
    """Groups of names side by side, a child for each; outcomes as they come, to the end or to Ctrl-C."""
    done: queue.Queue[Outcome | None] = queue.Queue()
    stop = threading.Event()

    def follow(names: Sequence[str]) -> None:
        try:
            for outcome in run(command, names, patience):
                done.put(outcome)
                if stop.is_set():
                    break
        finally:
            done.put(None)

    with ThreadPoolExecutor(len(groups) or 1) as pool:
        try:
            for names in groups:
                pool.submit(follow, names)
            for _ in groups:
                while (outcome := done.get()) is not None:
                    yield outcome
        finally:
            stop.set()
            for child in tuple(_CHILDREN):
                child.kill()
