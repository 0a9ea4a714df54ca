"""What a person sees of a run: lines, live progress, and the plot of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console

console = Console(highlight=False, markup=False, soft_wrap=True)


def say(label: str, text: str) -> None:
    """A line with a label; further lines of ``text`` stand below it."""
    console.print(f"{label:<12}" + text.replace("\n", "\n" + 12 * " "))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that ``what`` is being done."""
    with console.status(what) if console.is_terminal else nullcontext():
        yield
