"""What training minimises: the protocol of an objective, and next-token prediction as its first implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ..data.loader import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch on one rank: sums, so that ranks and micro-batches of unequal size add up.

    The trainer divides all of them by the sum of ``count`` over the step's micro-batches and ranks.
    """

    loss_sum: Tensor  # float32, 0-d, differentiable
    count: Tensor  # 0-d: the items that ``loss_sum`` adds up (tokens, pairs, completions)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # more sums over the same items


class Objective(Protocol):
    """``batch -> (loss_sum, count, metrics)`` of a model.

    The batch comes from the run's data source, on the model's device. With tensor parallelism it holds this rank's
    share of each sequence, but "positions" and "cu_seqlens" of packed documents whole. An item of
    ``DataSource.padding`` must add 0 to every sum. Nothing here may wait for the device.
    """

    metric_names: tuple[str, ...]  # the keys of ``Loss.metrics``, which are also their names in the log

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...


class NextTokenPrediction:
    """The negative log-likelihood of ``targets`` given ``tokens``, in nats, over the targets that are not ignored."""

    metric_names: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        tokens, targets = batch["tokens"], batch["targets"]
        packing = {name: batch[name] for name in ("positions", "cu_seqlens") if name in batch}
        return Loss(model(tokens, targets, reduction="sum", **packing), (targets != IGNORE_INDEX).sum())
