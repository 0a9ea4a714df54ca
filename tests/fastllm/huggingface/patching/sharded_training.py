"""What two processes do together: imported by the processes that test_training.py starts."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastllm
from tests.fastllm.huggingface.patching.models import make, trained

SIZE = 2
# Name -> the family, what becomes an FSDP unit of its own beside each block and the root, and whether the model is
# patched before it is sharded.
CASES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "llama": ("llama", (), True),
    "gemma2, tied": ("gemma2", (), True),
    "qwen3, head by itself": ("qwen3", ("lm_head",), True),
    "llama, patched last": ("llama", ("lm_head",), False),
}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    for case, (family, units, first) in CASES.items():
        try:
            results = _trained(make(family), units, first)
            if rank == 0:
                torch.save(results, Path(folder, f"{case}.pt"))
        except Exception:
            Path(folder, f"{case}.{rank}.error").write_text(traceback.format_exc())
        dist.barrier()
    dist.destroy_process_group()


def _trained(model: Any, units: tuple[str, ...], first: bool) -> list[torch.Tensor]:
    if first:
        fastllm.patch(model)
    parts: list[nn.Module] = [*model.model.layers, *(model.get_submodule(unit) for unit in units), model]
    for part in parts:
        fully_shard(part)
    if not first:
        fastllm.patch(model)
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in trained(model)]
