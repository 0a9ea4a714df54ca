"""Classes that are spread over the processes of a group: each holds some columns of the logits, or rows of the head.

The loss of a row needs two numbers of every process (csrc/cross_entropy.h): its log-sum-exp and its linear
part; the entropy is a third. They are exchanged once; the backward of logits exchanges nothing (Shoeybi et al. 2019,
arXiv:1909.08053), that of a head adds up the gradient of what all processes hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..library import has_values
from .options import Options, Targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """The part ``first_class`` and on of ``classes``; a group of None: all of them."""

    part: Tensor
    group: ProcessGroup | None
    first_class: int
    classes: int


def shard_of(op: str, name: str, x: Tensor, dim: int, group: ProcessGroup | None) -> Shard:
    """What this process holds of ``x``, whose dimension ``dim`` (0 or -1) is the classes: a tensor, a share of one
    (with a group), or a DTensor."""
    if hasattr(x, "placements"):  # a DTensor
        mesh, placements = x.device_mesh, x.placements
        if group is not None:
            raise ValueError(f"{op}: a DTensor knows its group; leave out the argument group")
        if mesh.ndim != 1 or not placements[0].is_shard(dim % x.ndim):
            raise ValueError(
                f"{op}: {name} that {'is' if name == 'weight' else 'are'} a DTensor must be sharded over the "
                f"{'last' if dim else 'first'} dimension on a mesh of one dimension, not {placements} on "
                f"{tuple(mesh.shape)}; redistribute, or pass {name}.to_local()"
            )
        classes, size = x.shape[dim], mesh.size()
        each = -(-classes // size)
        if each * (size - 1) >= classes:
            raise ValueError(f"{op}: {classes} classes, {each} each, leave some of {size} processes none")
        group = mesh.get_group() if size > 1 else None
        return Shard(x.to_local(), group, each * mesh.get_local_rank(), classes)
    if not isinstance(x, Tensor) or x.dim() == 0:
        return Shard(x, None, 0, 0)  # for the checks to refuse
    part = x.shape[dim]
    if group is None:
        return Shard(x, None, 0, part)
    from torch import distributed

    if distributed.get_world_size(group) == 1:
        return Shard(x, None, 0, part)
    return Shard(x, group, part * distributed.get_rank(group), part * distributed.get_world_size(group))


def combine(
    linear: Tensor, lse: Tensor, targets: Targets, options: Options, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """``(loss, lse)`` of each row, from every process's linear part and log-sum-exp."""
    shares = _exchanged([lse, linear], group)
    lse, linear = shares[:, 0].logsumexp(0), shares[:, 1].sum(0)
    target, class_weight, mean_weight = targets
    valid = target != options.ignore_index
    total = torch.ones_like(lse)
    if class_weight is not None:
        total = class_weight[target.where(valid, 0).clamp(0, options.classes - 1)]
        total = torch.lerp(total, mean_weight, options.label_smoothing)
    loss = total * lse - linear + options.z_loss * lse.square()
    return loss.where(valid, 0.0), lse


def combine_head(
    linear: Tensor, lse: Tensor, entropy: Tensor | None, target: Tensor, options: Options, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """``(loss, lse)`` of each token, without weights and smoothing, and with an entropy ``(loss, lse, entropy)``; NaN
    where the targets, which go along, are :func:`apart`."""
    more = [] if entropy is None else [entropy]
    shares = _exchanged([lse, linear, target.float(), *more], group)
    lse, linear = shares[:, 0].logsumexp(0).masked_fill(_apart(shares[:, 2]), torch.nan), shares[:, 1].sum(0)
    valid = target != options.ignore_index
    loss = (lse - linear).where(valid, 0.0)
    if entropy is None:
        return loss, lse
    log_share = shares[:, 0] - lse  # of the probability
    share = log_share.exp()
    entropy = (share * (shares[:, 3] - log_share)).where(share != 0, 0.0).sum(0)
    return loss, lse, entropy.where(valid, 0.0)


def apart(target: Tensor, group: ProcessGroup) -> Tensor:
    """Where the processes' targets differ, which on a CPU raises: each has a batch of its own then, as with a parameter
    of FSDP2, which is a DTensor too."""
    return _apart(_exchanged([target.reshape(-1).float()], group)[:, 0]).view(target.shape)


def _apart(targets: Tensor) -> Tensor:
    found = (targets != targets[:1]).any(0)
    if (targets.is_cpu or checks.DEBUG) and has_values() and found.any():
        raise ValueError(
            "linear_log_prob: target differs within the group, whose processes share one batch where they share the "
            "classes; for a weight that FSDP2 shards, call the op in the forward of the module that fully_shard wraps"
        )
    return found


def _exchanged(rows: list[Tensor], group: ProcessGroup) -> Tensor:
    """``[processes, rows, tokens]``: every process's ``rows``."""
    from torch.distributed import _functional_collectives as collectives

    mine = torch.stack(rows)
    size = torch.distributed.get_world_size(group)
    return collectives.all_gather_tensor(mine, 0, group).view(size, *mine.shape)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of every process's ``x``."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))


def gathered(shard: Shard, dim: int) -> Tensor:
    """The whole of what is sharded along ``dim``, differentiable in the part that is this process's own."""
    from torch.distributed import _functional_collectives as collectives

    size = torch.distributed.get_world_size(shard.group)
    each, part = -(-shard.classes // size), shard.part.movedim(dim, 0)
    mine = torch.nn.functional.pad(part.detach(), (0, 0) * (part.ndim - 1) + (0, each - len(part)))
    whole = collectives.all_gather_tensor(mine.contiguous(), 0, shard.group)
    end = shard.first_class + len(part)
    return torch.cat([whole[: shard.first_class], part, whole[end : shard.classes]]).movedim(0, dim)
