"""The memory that a rank needs, from a dry run: a training step of the sharded model on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..config import Config
from ..distributed.mesh import ParallelDims
from ..distributed.parallelize import begin_micro_batch, parallelize
from ..dtensor import to_local
from ..model.gpt import GPT
from ..training import optim

SAMPLED_LAYERS = (3, 5)  # a model of more layers is extrapolated from models of these: its blocks are alike


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank at the peak of a training step."""

    state: float  # float32 parameters and the optimizers' state
    working: float  # temporary: gathered parameters, activations, gradients

    @property
    def total(self) -> float:
        return self.state + self.working


def estimate_memory(config: Config, world_size: int, precision: torch.dtype) -> MemoryEstimate:
    """Of a training step of ``config`` on rank 0 of ``world_size``. Takes seconds, whatever the size.

    Not included: memory inside of kernels, and what CUDA, NCCL and the allocator need in addition.
    """
    layers = config.model.layers
    if layers <= SAMPLED_LAYERS[-1]:
        return _dry_run(config, world_size, precision)
    few, more = (
        _dry_run(replace(config, model=replace(config.model, layers=n)), world_size, precision) for n in SAMPLED_LAYERS
    )
    times = (layers - SAMPLED_LAYERS[0]) / (SAMPLED_LAYERS[1] - SAMPLED_LAYERS[0])
    state = few.state + times * (more.state - few.state)
    return MemoryEstimate(state, few.working + times * (more.working - few.working))


def _dry_run(config: Config, world_size: int, precision: torch.dtype) -> MemoryEstimate:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        dims = ParallelDims.from_config(config.parallel, "cpu")
        local = dims.max_local_batch(config.sequences)
        rows = min(config.train.micro_batch, max(1, local))
        micro_batches = min(2, -(-local // rows))  # two show the accumulation of gradients
        with torch.device("meta"):
            model = GPT(config.model, seed=None)
        parallelize(model, replace(config.parallel, compile=False), dims, precision)
        with FakeTensorMode(allow_non_fake_inputs=True):  # the meshes' tables of ranks
            model.to_empty(device="cpu")
            optimizers = optim.make_optimizers(model, config.optim)
            state = optim.state_tensors(model, optimizers)
            held = sum(to_local(t).nbytes for t in (*state.values(), *model.parameters()))
            tokens = torch.zeros(rows, config.model.max_seq_len // dims.tp_size, dtype=torch.int64)
            tracker = FSDPMemTracker(model, *optimizers)
            with tracker:
                for i in range(micro_batches):
                    tracker.reset_mod_stats()
                    begin_micro_batch(model, config.parallel, last=i == micro_batches - 1)
                    model(tokens, tokens, reduction="sum").backward()
                optim.step(optimizers, 1e-3, grad_scale=torch.ones(()), found_inf=torch.zeros(()))
            (peak,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    return MemoryEstimate(held, peak["Total"] - held)
