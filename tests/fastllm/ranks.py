"""Runs a function in several processes, which find each other as torchrun's do."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from fastllm import console
from tests import forked


def run(world: int, function: Callable[..., None], *args: Any) -> None:
    """``function(rank, *args)`` in ``world`` processes; an error in one is raised here."""
    forked.run(_start, (world, free_port(), function, args), world)


def free_port() -> int:
    """One that nobody is given before it is used: below those that the system hands out by itself (from 32768 on)."""
    ports = random.SystemRandom()  # tests seed the others alike in each process
    while True:
        with socket.socket() as free, suppress(OSError):  # taken: another
            port = ports.randrange(20000, 32000)
            free.bind(("127.0.0.1", port))
            return port


def _start(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    console.console.quiet = True
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in sizes.items()} | {"MASTER_ADDR": "127.0.0.1"})
    function(rank, *args)
