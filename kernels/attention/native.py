"""Attention in the native module: C++ on CPUs (csrc/cpu/attention*.cpp), CUDA C++ (csrc/cuda/attention*.cu)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import KERNELS, place
from .options import Options
from .packing import Packing

UNIT = 8  # elements of 16 bytes, which the CUDA C++ kernels copy at once


def _int64(*indices: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(torch.int64) for x in indices]


def _in_units(backend: str, *tensors: Tensor) -> list[Tensor]:
    """Those whose rows the kernels can read; copies, with zeros in the last columns, of others (head_dim 75)."""
    if backend == "cpu":
        return list(tensors)
    return [x if _aligned(x) else F.pad(x, (0, -x.shape[-1] % UNIT)).contiguous() for x in tensors]


def _aligned(x: Tensor) -> bool:
    *sizes, dim = x.shape
    strides = (stride for size, stride in zip(sizes, x.stride(), strict=False) if size > 1)
    return x.data_ptr() % (2 * UNIT) == 0 and not any(n % UNIT for n in (dim, *strides))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    backend: str,
    *outputs: Tensor | None,
) -> None:
    q, k, v = _in_units(backend, q, k, v)
    KERNELS[backend].attention_forward(q, k, v, sinks, *_int64(*packing[:2]), options, *outputs, *place(q))


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    options: Options,
    deterministic: bool,
    backend: str,
    *grads: Tensor,
) -> None:
    """The same gradients at every call, whatever ``deterministic`` says."""
    dout, q, k, v = _in_units(backend, dout, q, k, v)
    inputs = dout, dlse, q, k, v, out, lse, *_int64(*packing[:2])
    KERNELS[backend].attention_backward(*inputs, options, *grads, *place(q))


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    q, k, v = _in_units(backend, q, k, v)
    parts = None
    if backend == "cuda":
        splits = KERNELS[backend].attention_splits(q, k, v, options, place(q)[0])
        if splits > 1:
            rows, dim = out.shape[:-1].numel(), out.shape[-1]
            parts = torch.empty(splits, rows, dim + 1, dtype=torch.float32, device=q.device)
    inputs = q, k, v, *_int64(seqlens_k), block_table, sinks
    KERNELS[backend].attention_decode(*inputs, options, parts, out, lse, *place(q))
