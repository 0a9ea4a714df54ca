"""Signs of life between ranks: one that hangs is named, and one whose launcher is gone ends with a checkpoint.

A rank that is stopped or whose machine is gone keeps its connections, so the others would wait for it until the process
group's timeout, half an hour. A thread of each rank therefore writes a number to the store every few seconds, whatever
the rank is doing (a slow save or evaluation counts as life), and watches those of others.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

EVERY = 5.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one, after which a rank counts as hung


class Heartbeat(threading.Thread):
    """Of one rank. Rank 0 watches all others, and they watch rank 0.

    Args:
        store: of this thread alone: a client blocks all who share it.
        advice: what the message about a lost rank ends with; may be set later.
    """

    def __init__(self, store: dist.Store | None, rank: int, world: int, advice: str = "") -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.rank, self.advice = store, rank, advice
        self.watched = list(range(1, world)) if rank == 0 else [0]
        self._end = threading.Event()
        self._beats = 0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._me = f"process {os.getpid()} on {socket.gethostname()}"
        self._last: dict[int, bytes] = {}
        self._silent = dict.fromkeys(self.watched, 0.0)  # seconds

    def run(self) -> None:
        before = time.monotonic()
        while not self._end.wait(EVERY):
            now = time.monotonic()
            # At most two intervals: if this process was stopped itself, the others get time to be heard again.
            passed, before = min(now - before, 2 * EVERY), now
            self._check_parent()
            lost = self._exchange(passed) if self.store is not None else []
            if lost:
                self._give_up(lost)

    def stop(self) -> None:
        self._end.set()

    def _check_parent(self) -> None:
        """Without torchrun nobody would end this rank, nor notice that it trains on."""
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            os.kill(os.getpid(), signal.SIGTERM)

    def _exchange(self, passed: float) -> list[int]:
        """Write this rank's sign and read those of others. Returns the ranks that have been silent for too long."""
        assert self.store is not None
        self._beats += 1
        try:
            self.store.set(str(self.rank), f"{self._beats} {self._me}")
            known = [rank for rank in self.watched if rank in self._last or self.store.check([str(rank)])]
            values = dict(zip(known, self.store.multi_get([str(rank) for rank in known]) if known else [], strict=True))
        except (RuntimeError, ValueError):
            return []  # the launcher, which has the store, is stopped or gone: this says nothing about the ranks
        for rank in self.watched:
            heard = rank in values and self._last.get(rank) != values[rank]
            self._silent[rank] = 0.0 if heard else self._silent[rank] + passed
        self._last |= values
        return [rank for rank in self.watched if self._silent[rank] > SILENCE]

    def _give_up(self, lost: list[int]) -> None:
        """The main thread waits for the lost ranks within a collective, which nothing interrupts: end the process."""
        if self.rank < 2:  # the others would only repeat it
            who = {rank: value.decode().partition(" ")[2] for rank, value in self._last.items()}
            names = ", ".join(f"rank {rank} ({who.get(rank, 'never heard of')})" for rank in lost)
            hung = "has" if len(lost) == 1 else "have"
            what = f"{names} {hung} not answered for {SILENCE:.0f} s: stopped, hung, or its machine is gone"
            print(f"fastllm: error: {what}. {self.advice}", file=sys.stderr, flush=True)
        os._exit(2)


@contextmanager
def heartbeat(token: str) -> Iterator[Heartbeat]:
    """The heartbeat of this rank of the default process group, in the block. ``token``: the same on all ranks."""
    rank, world, store = dist.get_rank(), dist.get_world_size(), None
    if world > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        store = dist.PrefixStore(f"fastllm heartbeat {token}", client)
    thread = Heartbeat(store, rank, world)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()
