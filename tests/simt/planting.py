"""Sources of kernels with faults written into them, of which a test then turns on one at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .build import CACHE, REPOSITORY


class Fault(NamedTuple):
    """In place of a file's ``index``-th ``right`` behind ``behind`` stands ``wrong``, which asks whether it is ON."""

    what: str
    kernels: tuple[str, ...]  # in each of which it shows
    file: str
    right: str
    wrong: str
    index: int = 0
    behind: str = ""

    def place(self, text: str) -> int:
        start = text.index(self.behind)
        places = [start + match.start() for match in re.finditer(re.escape(self.right), text[start:])]
        assert len(places) > self.index, f"{self.what}: the source has changed"
        return places[self.index]


def plant(file: str, text: str, faults: Sequence[Fault]) -> str:
    """The source with its faults in it, each behind a condition."""
    places = [(fault.place(text), number, fault) for number, fault in enumerate(faults, 1) if fault.file == file]
    for at, number, fault in sorted(places, reverse=True):
        text = text[:at] + fault.wrong.replace("ON", f"(planted == {number})") + text[at + len(fault.right) :]
    return text


def planted_sources(name: str, faults: Sequence[Fault]) -> Path:
    """A copy of csrc with all faults in it; in one place, for the cache."""
    to = CACHE / name
    for path in (REPOSITORY / "csrc").rglob("*.*"):
        if path.suffix not in (".h", ".cu"):
            continue
        text, copied = path.read_text(), to / path.relative_to(REPOSITORY)
        if path.parent.name == "cuda":
            text = plant(path.name, text, faults)
        if not copied.exists() or copied.read_text() != text:
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(text)
    return to / "csrc"
