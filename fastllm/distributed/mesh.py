"""Process group, device mesh, and decisions that all ranks take together."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import ParallelConfig
from ..errors import UserError
from .heartbeat import Heartbeat, heartbeat

T = TypeVar("T")

# What errors of a collective say when another rank is gone.
_LOST_RANK_ERRORS = ("connection closed", "connection reset", "broken pipe", "nccl", "timed out", "connection refused")


@contextmanager
def process_group(device: torch.device) -> Iterator[Heartbeat]:
    """The default process group: of torchrun's ranks, or of this process alone (then no port is opened).

    All ranks leave together: a rank that left while another still communicates would abort that one. Raises UserError
    where the variables that torchrun sets make no sense, the ranks don't find each other, or one is lost in the block;
    then the message ends with the heartbeat's advice.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            rank_variable(name)
        try:
            dist.init_process_group(backend)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the ranks don't find each other ({reason}); start them with torchrun") from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    advice = ""
    try:
        with heartbeat(run_on_rank0(lambda: secrets.token_hex(8))) as thread:
            try:
                yield thread
                dist.barrier()
            finally:
                advice = thread.advice
    except BaseException as error:
        if dist.get_world_size() > 1:  # the others may be gone; the end of this process closes its connections
            if _is_lost_rank(error):
                raise UserError(_lost_rank(error, advice)) from None
            raise
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank_variable(name: str, default: int | None = None) -> int:
    """A number that torchrun puts into the environment; UserError where it is none."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 10):
        what = "not set" if text is None else repr(text)
        raise UserError(f"the environment variable {name} must be a number, as torchrun sets it; it is {what}")
    return int(text)


def _is_lost_rank(error: BaseException) -> bool:
    """Whether it is a collective's, of which another rank is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST_RANK_ERRORS)


def _lost_rank(error: BaseException, advice: str) -> str:
    what = f"rank {dist.get_rank()} of {dist.get_world_size()} lost the connection to another rank"
    reason = str(error).partition("\n")[0]
    return f"{what}, which ended first: see its message. {advice} ({reason})".replace("  ", " ")


def abort_all_ranks(message: str) -> NoReturn:
    """End every rank, all of which call this; rank 0 alone raises the message as a UserError."""
    if dist.get_rank() == 0:
        raise UserError(message)
    raise SystemExit(2)


def run_on_rank0(call: Callable[[], T]) -> T:
    """``call()`` on rank 0; every rank returns its result. A UserError in it ends every rank."""
    shared: list = [None, None]
    if dist.get_rank() == 0:
        try:
            shared[0] = call()
        except UserError as error:
            shared[1] = str(error)
    dist.broadcast_object_list(shared)
    result, problem = shared
    if problem is not None:
        abort_all_ranks(problem)
    return result


def run_on_all_ranks(call: Callable[[], T]) -> T:
    """``call()`` on each rank; a UserError in any of them ends every rank."""
    result: list[T] = []
    problem = None
    try:
        result.append(call())
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            abort_all_ranks(found if rank == 0 else f"rank {rank}: {found}")
    return result[0]


def local_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank_variable("LOCAL_RANK", 0))
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class ParallelDims:
    """The device mesh ``(dp_replicate, dp_shard, tp)`` and this rank's place in it.

    The mesh lacks dimensions of size one, except ``dp_shard``. A batch is divided into ``dp_size`` parts; the
    ``tp_size`` ranks of one part share the tokens of each sequence.
    """

    mesh: DeviceMesh
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int

    @classmethod
    def from_config(cls, config: ParallelConfig, device_type: str) -> ParallelDims:
        """For the default process group. Raises UserError where its size does not fit ``config``."""
        world, tp = dist.get_world_size(), config.tensor_parallel
        fixed = config.dp_replicate * tp
        if world % fixed:
            raise UserError(
                f"{world} ranks can't be divided into parallel.dp_replicate ({config.dp_replicate}) x "
                f"parallel.tensor_parallel ({tp}): start a multiple of {fixed} with torchrun --nproc-per-node"
            )
        sizes = {"dp_replicate": config.dp_replicate, "dp_shard": world // fixed, "tp": tp}
        sizes = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        dp_rank, tp_rank = divmod(dist.get_rank(), tp)
        return cls(mesh, dp_rank, world // tp, tp_rank, tp)

    def __str__(self) -> str:
        sizes = zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)
        return f"{dist.get_world_size()} ranks ({', '.join(f'{name} {size}' for name, size in sizes)})"

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The part of the mesh that FSDP shards over: ``dp_shard``, or ``(dp_replicate, dp_shard)`` for HSDP."""
        return self.mesh[tuple(name for name in self.mesh.mesh_dim_names or () if name != "tp")]

    def local_batch(self, n: int) -> range:
        """Which of the ``n`` items of a batch this rank owns."""
        return range(self.dp_rank * n // self.dp_size, (self.dp_rank + 1) * n // self.dp_size)

    def max_local_batch(self, n: int) -> int:
        """The most items that any rank owns of ``n``."""
        return -(-n // self.dp_size)

    def shard_sequence(self, tensor: Tensor) -> Tensor:
        """This rank's share of the tokens of ``[batch, seq, ...]``; a tensor ``[batch]`` has none and stays whole."""
        return tensor.chunk(self.tp_size, dim=1)[self.tp_rank] if tensor.dim() > 1 else tensor
