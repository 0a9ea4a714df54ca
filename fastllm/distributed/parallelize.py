"""One model on many processes: process group, device mesh, FSDP2, tensor parallelism, activation checkpointing."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..config import Config, ParallelConfig
from ..model.gpt import GPT
from .gloo import ExchangeAndAdd, SendToAll
from .mesh import Layout

ONE_UNIT = 2**24  # parameters below which a model is sharded as one, not by blocks: it saves more than it costs


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
