"""The GPT on many ranks: FSDP2, tensor and sequence parallelism, activation checkpointing."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any, cast

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
from .gloo import AllToAllReduceScatter, PointToPointAllGather
from .mesh import ParallelDims

SINGLE_UNIT_LIMIT = 2**24  # a model of fewer parameters is one FSDP unit: units for each block cost more than they save


def build_model(config: Config, dims: ParallelDims, precision: torch.dtype, device: torch.device) -> GPT:
    """A sharded GPT on ``device``, never materialized unsharded. Its initial weights depend on the seed alone."""
    with torch.device("meta"):
        model = GPT(config.model, seed=None)
    parallelize(model, config.parallel, dims, precision)
    model.to_empty(device=device)
    model.init_weights(config.train.seed)
    return model


def parallelize(model: GPT, config: ParallelConfig, dims: ParallelDims, precision: torch.dtype) -> GPT:
    """Apply tensor parallelism, activation checkpointing, torch.compile and FSDP2 to a GPT, in place.

    Weights that are trained are float32; FSDP2 casts all weights to ``precision`` for the computation. Gradients are
    summed over the ranks, not averaged: ranks may have different numbers of tokens.
    """
    if dims.tp_size > 1:
        # With tensor parallelism a block returns views of DTensors, which FSDP2 warns about (nothing writes to them
        # here). Gathering full weights takes two steps, which DTensor warns could be slow.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        for block in model.model.layers:
            apply_tensor_parallel(block, dims.mesh["tp"])
    for block in model.model.layers:
        if config.activation_checkpointing != "none":
            apply_activation_checkpointing(block, selective=config.activation_checkpointing == "selective")
        if config.compile:
            block.forward = torch.compile(block.forward)
    policy = MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay float32
    )
    reshard = config.reshard_after_forward
    # The root unit holds the norm, the head and the embedding (one unit, as they may be tied) and stays gathered.
    single_unit = sum(p.numel() for p in model.parameters()) < SINGLE_UNIT_LIMIT and not reshard
    for block in () if single_unit else model.model.layers:
        fully_shard(block, mesh=dims.fsdp_mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=dims.fsdp_mesh, mp_policy=policy, reshard_after_forward=False)
    if dims.dp_size > 1:
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
                if dist.get_backend(dims.mesh["dp_shard"].get_group()) == "gloo":
                    gather, scatter = cast(Any, PointToPointAllGather()), cast(Any, AllToAllReduceScatter())
                    unit.set_custom_all_gather(gather)
                    unit.set_custom_reduce_scatter(scatter)
    return model


def begin_micro_batch(model: GPT, config: ParallelConfig, last: bool) -> None:
    """Call before each forward pass of a step: ranks exchange gradients after the last one.

    With ``reshard_after_forward`` they reduce-scatter after each, because unsharded gradients would take the memory
    that the option is there to save.
    """
    scatter = last or config.reshard_after_forward
    unit = cast(FSDPModule, model)
    unit.set_requires_gradient_sync(scatter)
    unit.set_reshard_after_backward(scatter)
    unit.set_requires_all_reduce(last)  # over replicas


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters, which a forward pass without a backward leaves: until then ``parameters()`` of the
    model are these, and an optimizer would train copies."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def apply_tensor_parallel(block: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism inside a block (Shoeybi et al. 2019, arXiv:1909.08053), sequence parallelism around it.

    The ranks of ``mesh`` share heads and MLP features. Everything else sees this rank's tokens only (Korthikanti et
    al. 2022, arXiv:2205.05198): tokens are gathered before the matrices, and reduce-scattered after them.
    """
    tokens, full = Shard(1), Replicate()
    plan: dict[str, Any] = {
        "self_attn": PrepareModuleInput(input_layouts=(tokens, None, None), desired_input_layouts=(full, None, None)),
        "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(full,)),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan |= {name: ColwiseParallel() for name in columns}
    parallelize_module(block, mesh, plan)


def apply_activation_checkpointing(block: nn.Module, *, selective: bool) -> None:
    """Keep fewer activations of ``block`` and recompute them in the backward (Chen et al. 2016, arXiv:1604.06174).

    Selective: recompute what is cheap (norms, rotary, gate) and keep the results of matrix products and attention.
    """
    forward = block.forward
    random = any(isinstance(module, nn.Dropout) and module.p for module in block.modules())  # in adapters
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _save_expensive)
    block.forward = functools.partial(checkpoint, forward, **options)


def _save_expensive(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    expensive = any(part in name for part in ("aten.mm", "aten.addmm", "attention"))
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
