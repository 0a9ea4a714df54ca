"""The terminal: labelled lines and a spinner."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

from rich.console import Console

from .files import silence_stdout


class Output(io.TextIOBase):
    """Standard output that nothing depends on: when its reader leaves, or its disk is full, the work goes on.

    The first failure is said on standard error; what is written later goes nowhere.
    """

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)  # a file name may be any bytes
        self._try(lambda file: file.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(lambda file: file.flush())

    def isatty(self) -> bool:
        file = _stdout()
        return file is not None and file.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(_stdout(), "encoding", None) or "utf-8"

    def _try(self, call: Callable[[TextIO], object]) -> None:
        file = _stdout()
        if file is None:
            return
        try:
            call(file)
        except OSError as error:
            silence_stdout()
            try:
                why = error.strerror or type(error).__name__
                print(f"fastllm: warning: can't write to the standard output ({why}); going on", file=sys.stderr)
            except OSError:
                pass  # the terminal is gone as a whole


def _stdout() -> TextIO | None:
    """Standard output as it is now. While rich shows progress it puts itself there: then what it writes to."""
    file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return None if file is None or file.closed else file


console = Console(highlight=False, markup=False, soft_wrap=True, file=Output())


def say(label: str, text: str) -> None:
    """Print a line with a label; further lines of ``text`` are indented below it."""
    console.print(f"{label:<12}" + text.replace("\n", "\n" + 12 * " "))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on a terminal while the block runs."""
    with console.status(what) if console.is_terminal else nullcontext():
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Show nothing while the block runs, which is part of work that shows its own progress."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def visible(text: str) -> str:
    """``text`` without what would steer a terminal: control characters become U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def short(number: float) -> str:
    """1.52B, 124M, 65.5k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
    return f"{number:.0f}"
