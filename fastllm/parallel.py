"""One model on many processes: process group, device mesh, FSDP2, tensor parallelism, activation checkpointing."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .config import Config, ParallelConfig
from .dtensors import full, local
from .errors import UserError
from .gloo import ExchangeAndAdd, SendToAll
from .model import GPT

ONE_UNIT = 2**24  # parameters below which a model is sharded as one, not by blocks: it saves more than it costs


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


def build(config: Config, layout: Layout, precision: torch.dtype, device: torch.device) -> GPT:
    """A sharded GPT on ``device``; it never exists whole anywhere, and its weights depend on the seed alone."""
    with torch.device("meta"):
        model = GPT(config.model, seed=None)
    distribute(model, config.parallel, layout, precision)
    model.to_empty(device=device)
    model.init_weights(config.train.seed)
    return model


def distribute(model: GPT, config: ParallelConfig, layout: Layout, precision: torch.dtype) -> GPT:
    """Split, recompute, compile and shard a GPT, in place. Float32 weights, copies in ``precision`` to compute with.

    Gradients are summed over the processes, not averaged: the processes may have different numbers of tokens.
    """
    if layout.tensor_size > 1:
        # A block returns views of DTensors then, which FSDP2 warns of (nothing here writes to them); and whole weights
        # are gathered in two steps, of which DTensor says that they could be slow.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        for block in model.model.layers:
            split_matrices(block, layout.mesh["tensor"])
    for block in model.model.layers:
        if config.recompute != "none":
            recompute(block, selective=config.recompute == "selective")
        if config.compile:
            block.forward = torch.compile(block.forward)
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay float32
    )
    # The root holds the norm, the head and the embedding, one unit for tied ones too, and keeps them gathered.
    small = sum(p.numel() for p in model.parameters()) < ONE_UNIT and not config.reshard
    for block in () if small else model.model.layers:
        fully_shard(block, mesh=layout.data, mp_policy=policy, reshard_after_forward=config.reshard)
    fully_shard(model, mesh=layout.data, mp_policy=policy, reshard_after_forward=False)
    if layout.batch_size > 1:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
                if dist.get_backend(layout.mesh["shard"].get_group()) == "gloo":
                    part.set_custom_all_gather(SendToAll())
                    part.set_custom_reduce_scatter(ExchangeAndAdd())
    return model


def begin_pass(model: GPT, config: ParallelConfig, last: bool) -> None:
    """Before each forward pass of a step: gradients are exchanged after the last one.

    With ``reshard`` they are scattered after each, as whole gradients would take the memory that it is to save.
    """
    scatter = last or config.reshard
    model.set_requires_gradient_sync(scatter)
    model.set_reshard_after_backward(scatter)
    model.set_requires_all_reduce(last)  # over replicas


def split_matrices(block: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism within a block (Shoeybi et al. 2019, arXiv:1909.08053), sequence parallelism around it.

    Heads and MLP features are shared out over ``mesh``. Everything else sees this process's tokens only (Korthikanti
    et al. 2022, arXiv:2205.05198): they are gathered before the matrices and scattered, summed, after them.
    """
    tokens, whole = Shard(1), Replicate()
    plan: dict[str, Any] = {
        "self_attn": PrepareModuleInput(input_layouts=(tokens, None, None), desired_input_layouts=(whole, None, None)),
        "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan |= {name: ColwiseParallel() for name in columns}
    parallelize_module(block, mesh, plan)


def recompute(block: nn.Module, *, selective: bool) -> None:
    """Let ``block`` keep less for its backward pass, and compute it again there (Chen et al. 2016, arXiv:1604.06174).

    Selective: what is cheap to compute (norms, rotation, gate) is; results of matrix products and attention are kept.
    """
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_costly)
    block.forward = functools.partial(checkpoint, forward, **options)


def _keep_costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    costly = any(part in name for part in ("aten.mm", "aten.addmm", "attention"))
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


# ---- gradients ----


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
