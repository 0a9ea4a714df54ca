"""The loss on data that is not trained on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ..data.loader import BatchSource
from ..distributed.mesh import ParallelDims
from .micro_batches import micro_batches, pinned, to_device
from .objectives import Objective


class Evaluator:
    """Computes the mean loss of ``objective`` over the first ``n`` items of ``source``, on all ranks together."""

    def __init__(self, objective: Objective, source: BatchSource, n: int, micro_batch: int) -> None:
        self.objective, self.source, self.n, self.micro_batch = objective, source, n, micro_batch

    @torch.no_grad()
    def loss(self, model: nn.Module, dims: ParallelDims, device: torch.device) -> float:
        """Waits for the device."""
        sums = torch.zeros(2, device=device)
        for batch in micro_batches(self.source, 0, self.n, self.micro_batch, dims):
            loss = self.objective(model, to_device(pinned(batch) if device.type == "cuda" else batch, device))
            sums += torch.stack((loss.loss_sum, loss.count.to(sums.dtype)))
        dist.all_reduce(sums)
        loss_sum, count = sums.tolist()
        return loss_sum / max(count, 1.0)
