"""Sources of kernels with faults written into them, of which a test then turns on one at a time."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .build import CACHE, REPOSITORY, SIMT, build


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


class Planted:
    """The library of csrc's ``sources`` with all faults in them, which ``name``.cu calls."""

    right: dict[str, list[torch.Tensor] | str]  # of each kernel, without a fault

    def __init__(self, name: str, faults: Sequence[Fault], sources: Sequence[str], arguments: Sequence[Any],
                 flags: Sequence[str] = ()) -> None:  # fmt: skip
        csrc = planted_sources(name, faults)
        paths = [SIMT / f"{name}.cu", *(csrc / "cuda" / source for source in sources)]
        flags = (*flags, "-include", str(SIMT / "planted.h"))
        self.library = ctypes.CDLL(str(build(paths, name, flags=flags, include=[csrc])))
        self.library.run.argtypes, self.library.run.restype = arguments, ctypes.c_char_p
        self.library.simt_set_seed.argtypes = [ctypes.c_uint64]

    def call(self, kernel: str, fault: int, seed: int) -> list[torch.Tensor] | str:
        """The kernel's results, or the error's message."""
        raise NotImplementedError

    def shows(self, kernel: str, fault: int, seed: int) -> bool:
        found = self.call(kernel, fault, seed)
        return isinstance(found, str) or not all(map(torch.equal, found, self.right[kernel]))
