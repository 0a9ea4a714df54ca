"""Ctrl-C and SIGTERM, which take effect between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

from .. import console


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into ``caught`` (the signal's number); the second has its usual effect."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()
        console.say("stopping", "after this step, and everything is saved; again to stop at once")
