"""DTensors, the parameters of a sharded model: what this process holds of one, and the whole of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part; an ordinary tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole, gathered: all processes that hold a part must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice(tensor: Tensor) -> tuple[slice, ...]:
    """Where this process's part lies in the whole."""
    ranges = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for i in reversed(range(mesh.ndim)):  # tensor parallelism has cut first, and FSDP what that left
            dim = getattr(tensor.placements[i], "dim", None)
            if dim is not None:  # sharded; else replicated
                start, end = ranges[dim]
                step = -(-(end - start) // mesh.size(i))
                low = min(end, start + step * mesh.get_local_rank(i))
                ranges[dim] = (low, min(end, low + step))
    return tuple(slice(*r) for r in ranges)
