"""Process group, device mesh, and what all ranks decide together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import ParallelConfig
from ..errors import UserError


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group of the processes that torchrun started; without it of this process alone (no port is opened).

    All leave together: one that goes while another still talks to it makes that one abort.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
        dist.barrier()
    except BaseException:
        if dist.get_world_size() > 1:  # the others may be gone; the end of this process closes its connections
            raise
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def lost_processes(out: Path) -> Iterator[None]:
    """In the block: the loss of another process ends this one, with what a person can do about it."""
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not any(word in str(error).lower() for word in _LOST):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost the connection to another one, which ended "
            f"first: see what that one said. fastllm train --resume {out} goes on from the last checkpoint ({reason})"
        ) from None


_LOST = ("connection closed", "connection reset", "broken pipe", "nccl", "timed out", "connection refused")


def fail(message: str) -> NoReturn:
    """Raise what all processes have seen, once: the first one says it."""
    if dist.get_rank() == 0:
        raise UserError(message)
    raise SystemExit(2)


def done_by_first(call: Callable[[], Any]) -> Any:
    """What ``call`` gave the first process; the others wait for it."""
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = call()
        except UserError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result)
    if result[1] is not None:
        fail(result[1])
    return result[0]


def local_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Layout:
    """Who does what: the mesh ``(replicate, shard, tensor)``, without the dimensions of size one but for ``shard``.

    Each of the ``batch_size`` parts of a batch belongs to ``tensor_size`` processes, which share its tokens.
    """

    mesh: DeviceMesh
    batch_rank: int
    batch_size: int
    tensor_rank: int
    tensor_size: int

    @classmethod
    def of(cls, config: ParallelConfig, device_type: str) -> Layout:
        """For the process group that is there."""
        world = dist.get_world_size()
        others = config.replicate * config.tensor
        if world % others:
            raise UserError(
                f"{world} processes can't be split into parallel.replicate ({config.replicate}) x parallel.tensor "
                f"({config.tensor}): start a multiple of {others} with torchrun --nproc-per-node"
            )
        sizes = {"replicate": config.replicate, "shard": world // others, "tensor": config.tensor}
        sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        batch_rank, tensor_rank = divmod(dist.get_rank(), config.tensor)
        return cls(mesh, batch_rank, world // config.tensor, tensor_rank, config.tensor)

    def __str__(self) -> str:
        sizes = zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)
        return f"{dist.get_world_size()} processes ({', '.join(f'{name} {size}' for name, size in sizes)})"

    @property
    def data(self) -> DeviceMesh:
        """The part of the mesh that FSDP shards over: ``shard``, or ``(replicate, shard)`` for HSDP."""
        names = tuple(name for name in self.mesh.mesh_dim_names or () if name != "tensor")
        return self.mesh[names]

    def rows(self, count: int) -> range:
        """Which of the ``count`` sequences of a batch are this process's."""
        return range(self.batch_rank * count // self.batch_size, (self.batch_rank + 1) * count // self.batch_size)

    def most_rows(self, count: int) -> int:
        """The most sequences that a process has of ``count``: all do as many passes."""
        return -(-count // self.batch_size)

    def own_tokens(self, tokens: Tensor) -> Tensor:
        """This process's share of ``[batch, seq]``."""
        return tokens.chunk(self.tensor_size, dim=1)[self.tensor_rank]
