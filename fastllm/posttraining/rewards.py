"""Rewards of completions by a function of the user's, which runs in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..config import check
from ..errors import UserError
from ..input_files import one_line

START_SECONDS = 300.0  # for a worker to import the function: what it needs may be large, and the machine busy
CHUNK = 2**16  # bytes that are written or read at once


class Sample(NamedTuple):
    """A completion to score, and what the function may need to know for it.

    Attributes:
        prompt: the messages, each with "role" and "content".
        completion: the text.
        row: the other keys of the prompt's JSON line.
    """

    prompt: Sequence[Mapping[str, Any]]
    completion: str
    row: Mapping[str, Any] = {}


class Score(NamedTuple):
    """The reward of a completion: a finite number; or None, and what went wrong on one line."""

    value: float | None
    problem: str = ""


def absolute(spec: str) -> str:
    """``spec``, of a file such that it is found from any working directory."""
    source, _, name = spec.rpartition(":")
    return f"{os.path.realpath(source)}:{name}" if source.endswith(".py") else spec


class RewardPool:
    """Worker processes that call a reward function, and outlive neither ``close`` nor the process that made them.

    The function is called for one sample: ``reward(prompt, completion, **row)``, all by keyword and only those that its
    signature takes. It returns a number. What it prints goes to our stderr. One that raises, hangs, ends its process or
    returns no finite number spoils that sample only. After a fork, each process that scores has workers of its own.

    Args:
        spec: ``MODULE:FUNCTION`` or ``path/to/file.py:FUNCTION``. The working directory is importable.
        workers: processes that run at once.
        seconds: that the function may take for a sample; then its process, and those that it started, are killed.

    Raises:
        UserError: The function can't be imported.
    """

    def __init__(self, spec: str, workers: int = 2, seconds: float = 10.0) -> None:
        check(workers > 0, f"a reward needs at least 1 worker, not {workers}")
        check(seconds > 0, f"a reward needs more than 0 seconds, not {seconds:g}")
        module, _, function = spec.rpartition(":")
        check(bool(module and function), f"the reward {spec!r} must be MODULE:FUNCTION or FILE.py:FUNCTION")
        self.spec, self.workers, self.seconds = spec, workers, seconds
        self._start()

    def _start(self) -> None:
        self._owner = os.getpid()
        self._all = [_Worker(self.spec, self.seconds) for _ in range(self.workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        # Its threads start the processes and live as long: Linux ends a worker with the thread that started it.
        self._threads = ThreadPoolExecutor(self.workers, "reward")
        try:
            list(self._threads.map(_Worker.start, self._all))
        except BaseException:
            self.close()
            raise
        for worker in self._all:
            self._idle.put(worker)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """The score of each sample, in order."""
        if self._owner != os.getpid():  # a fork has neither the threads nor the workers
            self._start()
        try:
            return list(self._threads.map(self._score, samples))
        except BaseException:  # interrupted: threads wait for workers, which may take long
            self._kill()
            raise

    def _score(self, sample: Sample) -> Score:
        worker = self._idle.get()
        try:
            return worker.score(sample)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers. A sample that is being scored is given up."""
        if self._owner != os.getpid():
            return
        try:
            for worker in self._all:
                worker.closed = True
            if self._idle.qsize() < self.workers:
                self._kill()
            self._threads.shutdown(cancel_futures=True)
            for worker in self._all:
                worker.stop()
        except BaseException:  # interrupted
            self._kill()
            raise

    def _kill(self) -> None:
        for worker in self._all:
            worker.kill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """A process that calls the function. One sample at a time; one that it did not survive starts another process."""

    def __init__(self, spec: str, seconds: float) -> None:
        self.spec, self.seconds = spec, seconds
        self.closed = False  # it starts no other process
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """UserError where the function can't be imported."""
        if self._process is not None:
            return
        script = str(Path(__file__).with_name("reward_worker.py"))
        self._process = subprocess.Popen(
            # -P: the modules beside the script are not for the function to import.
            [sys.executable, "-P", script, self.spec, str(os.getpid())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,  # Ctrl-C is ours; and what the function starts is killed with it
        )
        if self.closed:
            self.kill()
        try:
            answer = self._exchange(b"", START_SECONDS)
        except _Ended as ended:
            raise UserError(f"the reward {self.spec!r} can't be imported: {ended}") from None
        if "error" in answer:
            self.stop()
            raise UserError(f"the reward {self.spec!r}: {one_line(answer['error'])}")

    def score(self, sample: Sample) -> Score:
        arguments = {**sample.row, "prompt": sample.prompt, "completion": sample.completion}
        try:
            self.start()
            answer = self._exchange(json.dumps(arguments).encode() + b"\n", self.seconds)
        except (_Ended, UserError) as error:
            return Score(None, str(error))
        return Score(answer.get("value"), one_line(answer.get("error", "")))

    def _exchange(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send ``request`` while listening, so that neither side waits for the other; the answer, a line of JSON."""
        process = self._process
        assert process and process.stdin and process.stdout
        deadline = time.monotonic() + seconds
        unsent, answer = memoryview(request), b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if unsent:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                left = deadline - time.monotonic()
                ready = {key.fileobj for key, _ in selector.select(max(left, 0.0))}
                if not ready and left <= 0:
                    self.kill()
                    self.stop()
                    raise _Ended(f"took longer than {seconds:g} s")
                if process.stdin in ready:
                    try:
                        unsent = unsent[process.stdin.write(unsent[:CHUNK]) :]
                    except BrokenPipeError:
                        unsent = unsent[:0]
                    if not unsent:
                        selector.unregister(process.stdin)
                if process.stdout in ready:
                    chunk = process.stdout.read(CHUNK)
                    if not chunk:
                        raise _Ended(f"its process ended: {_reason(self.stop())}")
                    answer += chunk
        return json.loads(answer)

    def kill(self) -> None:
        """Kill the process and those that it started; from any thread."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> int | None:
        """End the process, which gets a second for it; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin and process.stdout
        process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        return process.returncode


class _Ended(Exception):
    """There is no answer; the message says why."""


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
