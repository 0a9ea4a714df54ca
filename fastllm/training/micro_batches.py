"""Micro-batches: this rank's share of a batch, in parts that fit, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..data.loader import Batch, BatchSource
from ..distributed.mesh import ParallelDims


def micro_batches(
    source: BatchSource, index: int, n: int, size: int, dims: ParallelDims, device: torch.device
) -> Iterator[Batch]:
    """This rank's share of the items ``index`` to ``index + n``, up to ``size`` at a time.

    All ranks yield the same number: one that has no items left yields padding.
    """
    local = dims.local_batch(n)
    for first in range(0, dims.max_local_batch(n), size):
        part = local[first : first + size]
        batch = source.batch(index + part.start, len(part)) if part else source.padding()
        yield to_device({name: dims.shard_sequence(tensor) for name, tensor in batch.items()}, device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Without waiting for the copy."""
    if device.type == "cpu":
        return batch
    return {name: tensor.contiguous().pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
