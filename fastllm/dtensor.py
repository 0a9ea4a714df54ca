"""DTensors, the parameters of a sharded model: this rank's shard, and the full tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """The full tensor, gathered. All ranks that hold a shard must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_slice(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the full tensor."""
    ranges = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for i in reversed(range(mesh.ndim)):  # tensor parallelism shards first, then FSDP shards the result
            dim = getattr(tensor.placements[i], "dim", None)
            if dim is not None:  # sharded; else replicated
                start, end = ranges[dim]
                step = -(-(end - start) // mesh.size(i))
                low = min(end, start + step * mesh.get_local_rank(i))
                ranges[dim] = (low, min(end, low + step))
    return tuple(slice(*r) for r in ranges)
