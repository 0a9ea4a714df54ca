"""Gradients and weights of a model that is sharded over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..dtensor import full, local
from .mesh import Layout


def is_split(tensor: Tensor) -> bool:
    """Whether tensor parallelism has cut it."""
    return isinstance(tensor, DTensor) and "tensor" in (tensor.device_mesh.mesh_dim_names or ())


def sum_whole_gradients(model: nn.Module, layout: Layout) -> None:
    """Complete the gradients of what tensor parallelism did not cut: each process has them of its tokens only."""
    if layout.tensor_size == 1:
        return
    group = layout.mesh["tensor"].get_group()
    works = [
        dist.all_reduce(local(p.grad), group=group, async_op=True)
        for p in model.parameters()
        if p.grad is not None and not is_split(p)
    ]
    for work in works:
        work.wait()


def squared_norm_share(model: nn.Module, layout: Layout) -> Tensor:
    """This process's share, float32: over all processes they add up to the squared norm of the whole gradient."""
    replicas = layout.batch_size // layout.mesh["shard"].size()
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in model.parameters():
        if p.grad is not None:
            parts[is_split(p)].append(local(p.grad))
    total = torch.zeros((), device=next(model.parameters()).device)
    for split, gradients in parts.items():
        if gradients:
            held_by = replicas * (1 if split else layout.tensor_size)
            total += torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)).square().sum() / held_by
    return total


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU of the first process, gathered one after the other; elsewhere nothing."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor)
        if dist.get_rank() == 0:
            state[name] = whole.cpu()
    return state
