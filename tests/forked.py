"""Processes for tests of several ranks, forked from one that has imported PyTorch, which takes each of them seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

IMPORTED = ["fastllm.training.pretrain", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.testing"]


def context() -> multiprocessing.context.ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def run(function: Callable[..., None], args: tuple[Any, ...], processes: int) -> None:
    """``function(rank, *args)`` in each of them; an error in one is raised here."""
    context()
    torch.multiprocessing.start_processes(function, args, processes, start_method="forkserver")
