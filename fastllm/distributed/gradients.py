"""Gradients and weights of a model that is sharded over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..dtensor import to_full, to_local
from .mesh import ParallelDims


def is_tensor_sharded(tensor: Tensor) -> bool:
    """Whether tensor parallelism shards it."""
    return isinstance(tensor, DTensor) and "tp" in (tensor.device_mesh.mesh_dim_names or ())


def all_reduce_replicated_grads(model: nn.Module, dims: ParallelDims) -> None:
    """Complete the gradients of parameters that tensor parallelism replicates: each rank has those of its tokens."""
    if dims.tp_size == 1:
        return
    group = dims.mesh["tp"].get_group()
    works = [
        dist.all_reduce(to_local(p.grad), group=group, async_op=True)
        for p in model.parameters()
        if p.grad is not None and not is_tensor_sharded(p)
    ]
    for work in works:
        work.wait()


def local_grad_norm_sq(model: nn.Module, dims: ParallelDims) -> Tensor:
    """This rank's share of the squared gradient norm, float32 0-d: summed over all ranks they give the whole."""
    replicas = dims.dp_size // dims.mesh["dp_shard"].size()
    shards: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in model.parameters():
        if p.grad is not None:
            shards[is_tensor_sharded(p)].append(to_local(p.grad))
    total = torch.zeros((), device=next(model.parameters()).device)
    for tensor_sharded, gradients in shards.items():
        if gradients:
            copies = replicas * (1 if tensor_sharded else dims.tp_size)
            total += torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)).square().sum() / copies
    return total


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The full weights on the CPU of rank 0, gathered one after the other; on the other ranks nothing."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = to_full(tensor)
        if dist.get_rank() == 0:
            state[name] = full.cpu()
    return state
