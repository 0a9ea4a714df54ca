"""Micro-batches: this rank's share of a batch, in parts that fit, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..data.loader import Batch, BatchSource, cu_seqlens_of
from ..distributed.mesh import ParallelDims


def micro_batches(source: BatchSource, index: int, n: int, size: int, dims: ParallelDims) -> Iterator[Batch]:
    """This rank's share of the items ``index`` to ``index + n``, up to ``size`` at a time, on the CPU.

    All ranks yield the same number: one that has no items left yields padding. With "positions" comes "cu_seqlens";
    both are of whole sequences, also where tensor parallelism shares the tokens of each sequence out.
    """
    local = dims.local_batch(n)
    for first in range(0, dims.max_local_batch(n), size):
        part = local[first : first + size]
        batch = source.batch(index + part.start, len(part)) if part else source.padding()
        sharded = {
            name: tensor if name.endswith("positions") else dims.shard_sequence(tensor)
            for name, tensor in batch.items()
        }
        yield sharded | ({"cu_seqlens": cu_seqlens_of(batch["positions"])} if "positions" in batch else {})


def pinned(batch: Batch) -> Batch:
    """In memory from which a GPU copies without the processor."""
    return {name: tensor.contiguous().pin_memory() for name, tensor in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Without waiting for the copy."""
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
