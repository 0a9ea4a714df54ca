"""Logits whose classes are spread over the processes of a group, each holding some columns.

The loss of a row needs two numbers of every process (csrc/cross_entropy.h): its log-sum-exp and its linear
part. They are exchanged once; the backward exchanges nothing (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .options import Options, Targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """Columns ``first_class`` and on of ``classes``; a group of None: all of them."""

    logits: Tensor
    group: ProcessGroup | None
    first_class: int
    classes: int


def shard_of(logits: Tensor, group: ProcessGroup | None) -> Shard:
    """What this process holds of ``logits``: a tensor, a share of one (with a group), or a DTensor."""
    if hasattr(logits, "placements"):  # a DTensor
        mesh, placements = logits.device_mesh, logits.placements
        if group is not None:
            raise ValueError("cross_entropy: a DTensor knows its group; leave out the argument group")
        if mesh.ndim != 1 or not placements[0].is_shard(logits.ndim - 1):
            raise ValueError(
                "cross_entropy: logits that are a DTensor must be sharded over the last dimension on a mesh of one "
                f"dimension, not {placements} on {tuple(mesh.shape)}; redistribute them, or pass logits.to_local()"
            )
        classes, size = logits.shape[-1], mesh.size()
        each = -(-classes // size)
        if each * (size - 1) >= classes:
            raise ValueError(f"cross_entropy: {classes} classes, {each} each, leave some of {size} processes none")
        group = mesh.get_group() if size > 1 else None
        return Shard(logits.to_local(), group, each * mesh.get_local_rank(), classes)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        return Shard(logits, None, 0, 0)  # for the checks to refuse
    cols = logits.shape[-1]
    if group is None:
        return Shard(logits, None, 0, cols)
    from torch import distributed

    if distributed.get_world_size(group) == 1:
        return Shard(logits, None, 0, cols)
    return Shard(logits, group, cols * distributed.get_rank(group), cols * distributed.get_world_size(group))


def combine(
    linear: Tensor, lse: Tensor, targets: Targets, options: Options, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """``(loss, lse)`` of each row, from every process's linear part and log-sum-exp."""
    from torch.distributed import _functional_collectives as collectives

    shares = collectives.all_gather_tensor(torch.stack([lse, linear]), 0, group).view(-1, 2, lse.numel())
    lse, linear = shares[:, 0].logsumexp(0), shares[:, 1].sum(0)
    target, class_weight, mean_weight = targets
    valid = target != options.ignore_index
    total = torch.ones_like(lse)
    if class_weight is not None:
        total = class_weight[target.where(valid, 0).clamp(0, options.classes - 1)]
        total = torch.lerp(total, mean_weight, options.label_smoothing)
    loss = total * lse - linear + options.z_loss * lse.square()
    return loss.where(valid, 0.0), lse


def gathered(shard: Shard) -> Tensor:
    """The whole logits, differentiable in the part that is this process's own."""
    from torch.distributed import _functional_collectives as collectives

    size = torch.distributed.get_world_size(shard.group)
    each = -(-shard.classes // size)
    mine = torch.nn.functional.pad(shard.logits.detach(), (0, each - shard.logits.shape[-1]))
    whole = collectives.all_gather_tensor(mine.movedim(-1, 0).contiguous(), 0, shard.group).movedim(0, -1)
    end = shard.first_class + shard.logits.shape[-1]
    return torch.cat([whole[..., : shard.first_class], shard.logits, whole[..., end : shard.classes]], -1)
