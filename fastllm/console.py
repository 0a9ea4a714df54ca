"""The terminal: labelled lines and a spinner."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console


def stdout() -> Any:
    """The standard output itself: while rich shows progress, ``sys.stdout`` writes to the console, and so to us."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


class Output(io.TextIOBase):
    """Standard output that nothing depends on: when its reader leaves, or its disk is full, the work goes on.

    The first failure is said on standard error; what is written later goes nowhere.
    """

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)  # a file name may be any bytes
        self._try(lambda: stdout().write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: stdout().flush())

    def isatty(self) -> bool:
        return bool(sys.stdout) and not sys.stdout.closed and sys.stdout.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stdout, "encoding", None) or "utf-8"

    def _try(self, call: Callable[[], object]) -> None:
        if sys.stdout is None or sys.stdout.closed:
            return
        try:
            call()
        except OSError as error:
            silence_stdout()
            try:
                why = error.strerror or type(error).__name__
                print(f"fastllm: warning: can't write to the standard output ({why}); going on", file=sys.stderr)
            except OSError:
                pass  # the terminal is gone as a whole


def silence_stdout() -> None:
    """Send the standard output nowhere, what it still holds included: at its end Python writes that again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file of the system, as in a notebook
        sys.stdout = None


console = Console(highlight=False, markup=False, soft_wrap=True, file=Output())


def say(label: str, text: str) -> None:
    """Print a line with a label; further lines of ``text`` are indented below it."""
    console.print(f"{label:<12}" + text.replace("\n", "\n" + 12 * " "))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on a terminal while the block runs."""
    with console.status(what) if console.is_terminal else nullcontext():
        yield
