"""The loss on data that is not trained on."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..data.loader import BatchSource
from ..distributed.mesh import ParallelDims
from .micro_batches import micro_batches, pinned, to_device
from .objectives import Objective, means


class Evaluator(Protocol):
    """What the trainer calls every ``train.eval_every`` steps, on all ranks together."""

    def evaluate(self, model: nn.Module, dims: ParallelDims, device: torch.device) -> tuple[float, dict[str, float]]:
        """The validation loss, and more numbers by their names."""
        ...


class LossEvaluator:
    """The mean loss and metrics of ``objective`` over the first ``n`` items of ``source``."""

    def __init__(self, objective: Objective, source: BatchSource, n: int, micro_batch: int) -> None:
        self.objective, self.source, self.n, self.micro_batch = objective, source, n, micro_batch

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dims: ParallelDims, device: torch.device) -> tuple[float, dict[str, float]]:
        """Waits for the device."""
        names = self.objective.metric_names
        sums = torch.zeros(3 + 2 * len(names), device=device)
        was_training = model.training
        model.eval()  # adapters may have dropout
        for batch in micro_batches(self.source, 0, self.n, self.micro_batch, dims):
            loss = self.objective(model, to_device(pinned(batch) if device.type == "cuda" else batch, device))
            sums += loss.sums(names, sums.dtype)
        model.train(was_training)
        dist.all_reduce(sums)
        found = means(sums[3:]).tolist()
        return float(sums[0] / sums[1].clamp(min=1.0)), dict(zip(names, found, strict=True))
