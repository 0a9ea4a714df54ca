"""Ctrl-C, SIGTERM and SIGHUP, which take effect between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

from .. import console

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Turns the first signal into ``caught`` (its number). A second Ctrl-C or SIGTERM has its usual effect.

    SIGHUP, of a terminal that closes, is ignored where it was before (nohup); it often comes twice, and the second one
    changes nothing.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught = number
            for other in self._before.keys() - {signal.SIGHUP}:
                signal.signal(other, self._before[other])
            console.say("stopping", "after this step, and everything is saved; again to stop at once")
