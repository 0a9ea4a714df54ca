"""The memory that a process needs, from a dry run: the sharded model as it is trained, on tensors without content."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..config import Config
from ..distributed.mesh import Layout
from ..distributed.parallelize import begin_pass, distribute
from ..dtensor import local
from ..model.gpt import GPT
from ..training import optim

SOME = (3, 5)  # layers of the models that are run in place of one with more: its blocks are all alike


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at the peak of a training step."""

    state: float  # float32 parameters and the optimizers' state
    working: float  # what comes and goes: gathered parameters, activations, gradients

    @property
    def total(self) -> float:
        return self.state + self.working


def memory(config: Config, processes: int, precision: torch.dtype) -> Memory:
    """Of a training step of ``config`` in the first of ``processes``, in seconds, whatever their number.

    What is inside of kernels is not seen, nor what CUDA, NCCL and the allocator take beside the tensors.
    """
    layers = config.model.layers
    if layers <= SOME[-1]:
        return _run(config, processes, precision)
    few, more = (_run(replace(config, model=replace(config.model, layers=n)), processes, precision) for n in SOME)
    times = (layers - SOME[0]) / (SOME[1] - SOME[0])
    return Memory(
        few.state + times * (more.state - few.state), few.working + times * (more.working - few.working)
    )  # fmt: skip


def _run(config: Config, processes: int, precision: torch.dtype) -> Memory:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        layout = Layout.of(config.parallel, "cpu")
        rows = min(config.train.micro_batch, max(1, layout.most_rows(config.sequences)))
        passes = min(2, -(-layout.most_rows(config.sequences) // rows))  # two: gradients are accumulated
        with torch.device("meta"):
            model = GPT(config.model, seed=None)
        distribute(model, replace(config.parallel, compile=False), layout, precision)
        with FakeTensorMode(allow_non_fake_inputs=True):  # the meshes' tables of ranks
            model.to_empty(device="cpu")
            optimizers = optim.make_optimizers(model, config.optim)
            state = optim.state_tensors(model, optimizers)
            held = sum(local(t).nbytes for t in (*state.values(), *model.parameters()))
            tokens = torch.zeros(rows, config.model.context // layout.tensor_size, dtype=torch.int64)
            tracker = FSDPMemTracker(model, *optimizers)
            with tracker:
                for i in range(passes):
                    tracker.reset_mod_stats()
                    begin_pass(model, config.parallel, last=i == passes - 1)
                    model(tokens, tokens, reduction="sum").backward()
                optim.step(optimizers, 1e-3, torch.ones(()), torch.zeros(()))
            (peak,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    return Memory(held, peak["Total"] - held)
