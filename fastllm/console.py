"""The terminal: labelled lines and a spinner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console

console = Console(highlight=False, markup=False, soft_wrap=True)


def say(label: str, text: str) -> None:
    """Print a line with a label; further lines of ``text`` are indented below it."""
    console.print(f"{label:<12}" + text.replace("\n", "\n" + 12 * " "))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with ``what`` on a terminal while the block runs."""
    with console.status(what) if console.is_terminal else nullcontext():
        yield
