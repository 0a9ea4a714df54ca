"""Collectives of FSDP2 on gloo, whose own are slower between ranks of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GlooCollective:
    """The part of FSDP2's interface for custom collectives that both share."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class PointToPointAllGather(_GlooCollective):
    """All-gather by direct sends. Gloo's own copies once more (2 ranks, 3.6 MB: 1.7 ms; this: 1.25)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        shards, rank = output_tensor.view(group.size(), -1), group.rank()
        works = [
            work
            for other in range(group.size())
            if other != rank
            for work in (
                dist.isend(input_tensor, group=group, group_dst=other),
                dist.irecv(shards[other], group=group, group_src=other),
            )
        ]
        if shards[rank].data_ptr() != input_tensor.data_ptr():
            shards[rank].copy_(input_tensor)
        for work in works:
            if work is not None:  # a rank outside of the group has none
                work.wait()


class AllToAllReduceScatter(_GlooCollective):
    """Reduce-scatter by an all-to-all and local sums. Gloo's own is slower (2 ranks, 3.6 MB: 3.4 ms; this: 1.6)."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        first, *others = received.chunk(group.size())
        output_tensor.copy_(first)
        for other in others:
            output_tensor.add_(other)
