"""The process that renders chat templates, and what happens where a template is too much for it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import UserError, require_packages
from ..input_files import one_line

SECONDS = 2.0  # of processor time for a chat; most take a thousandth of one


def render(source: str, variables: dict[str, Any]) -> str:
    """What the template ``source`` makes of ``variables``, which are plain JSON; UserError where it fails."""
    return _renderers.setdefault(os.getpid(), _Renderer()).render(source, variables)


class _Renderer:
    """The process that renders. One chat at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            line = self._answer(request)
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the chat template: {one_line(answer['error'])}")
        return answer["text"]

    def _answer(self, request: bytes) -> bytes:
        process = self._process = self._process or _start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # interrupted between a request and its answer
            self.stop()
            raise
        if not line.endswith(b"\n"):
            code = self.stop()
            if code == -signal.SIGPROF:
                raise UserError(f"the chat template does not end: it has worked for {SECONDS:g} seconds")
            raise UserError(f"the chat template: its process ended ({code})")
        return line

    def stop(self) -> int | None:
        """End the process; the next chat starts another."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin and process.stdout
        with contextlib.suppress(OSError):  # it still holds a part of the request
            process.stdin.close()
        code = process.poll()
        if code is None:
            try:
                code = process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        process.stdout.close()
        return code


def _start() -> subprocess.Popen[bytes]:
    require_packages("a chat template", "jinja2", install="pip install jinja2")
    script = str(Path(__file__).with_name("chat_template_worker.py"))
    # -P: beside the script lie modules of names that the standard library has too.
    return subprocess.Popen(
        [sys.executable, "-P", script, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


_renderers: dict[int, _Renderer] = {}  # by process: a fork needs its own


@atexit.register
def _stop() -> None:
    if renderer := _renderers.pop(os.getpid(), None):
        renderer.stop()
