"""What training minimises: the protocol of an objective, and next-token prediction as its first implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..data.loader import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch on one rank: sums, so that ranks and micro-batches of unequal size add up.

    The trainer divides them by the sum of ``count`` over the step's micro-batches and ranks, or a metric by the sum of
    its own of ``counts``.
    """

    loss_sum: Tensor  # float32, 0-d, differentiable
    count: Tensor  # 0-d: the items that ``loss_sum`` adds up (tokens, pairs, completions)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # more sums
    counts: Mapping[str, Tensor] = field(default_factory=dict)  # of the metrics that are sums over other items
    tokens: Tensor | None = None  # 0-d: tokens that were targets; None: ``count``

    def sums(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """``[3 + 2 · names]``: loss, count and tokens; the metrics ``names``; their counts. See :func:`means`."""
        tokens = self.count if self.tokens is None else self.tokens
        counts = (self.counts.get(name, self.count) for name in names)
        parts = (self.loss_sum.detach(), self.count, tokens, *(self.metrics[name] for name in names), *counts)
        return torch.stack([part.to(dtype) for part in parts])


def means(sums: Tensor) -> Tensor:
    """Of metrics and then their counts, added up: the mean of each metric; 0 where it has no items."""
    totals, counts = sums.chunk(2)
    return torch.where(counts > 0, totals / counts, 0.0)


class Objective(Protocol):
    """``batch -> (loss_sum, count, metrics)`` of a model.

    The batch comes from the run's data source, on the model's device. With tensor parallelism it holds this rank's
    share of each sequence, but "positions" and "cu_seqlens" of packed documents whole. An item of
    ``DataSource.padding`` must add 0 to every sum. Nothing here may wait for the device.
    """

    metric_names: tuple[str, ...]  # the keys of ``Loss.metrics``, which are also their names in the log

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...


@runtime_checkable
class StepObjective(Objective, Protocol):
    """An objective that needs something of the whole step before its first micro-batch."""

    def begin_step(self, model: nn.Module, step: int, index: int, batches: list[Batch]) -> list[Batch]:
        """What ``batches``, this rank's micro-batches of the items from ``index`` on, become. All ranks call this
        together, and return equally many."""
        ...


class NextTokenPrediction:
    """The negative log-likelihood of ``targets`` given ``tokens``, in nats, over the targets that are not ignored."""

    metric_names: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        tokens, targets = batch["tokens"], batch["targets"]
        packing = {name: batch[name] for name in ("positions", "cu_seqlens") if name in batch}
        return Loss(model(tokens, targets, reduction="sum", **packing), (targets != IGNORE_INDEX).sum())
