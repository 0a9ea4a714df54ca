"""Attention in the native module: C++ on CPUs (csrc/cpu/attention*.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import DTYPE_CODES, KERNELS, place, pointer
from .options import Options

Heads = tuple[int, int, int, int]


def _heads(x: Tensor) -> Heads:
    """Address and strides of ``x``, whose last dimension is contiguous (csrc/attention.h)."""
    return (x.data_ptr(), x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def _index(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def _rest(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, options: Options) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    sizes = (sequences, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1])
    return sizes, tuple(options), DTYPE_CODES[q.dtype], *place(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    backend: str,
) -> None:
    cu_q, cu_k = _index(cu_seqlens_q), _index(cu_seqlens_k)
    KERNELS[backend].attention_forward(
        _heads(q), _heads(k), _heads(v), pointer(sinks), pointer(cu_q), pointer(cu_k), out.data_ptr(), lse.data_ptr(),
        *_rest(q, k, cu_q, options),
    )  # fmt: skip


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
    options: Options,
    backend: str,
) -> None:
    cu_q, cu_k = _index(cu_seqlens_q), _index(cu_seqlens_k)
    KERNELS[backend].attention_backward(
        _heads(dout), _heads(q), _heads(k), _heads(v), pointer(cu_q), pointer(cu_k), out.data_ptr(), lse.data_ptr(),
        pointer(dlse), delta.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), *_rest(q, k, cu_q, options),
    )  # fmt: skip


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    backend: str,
) -> None:
    seen = _index(seqlens_k)
    KERNELS[backend].attention_decode(
        _heads(q), _heads(k), _heads(v), pointer(sinks), pointer(seen), out.data_ptr(), lse.data_ptr(),
        *_rest(q, k, None, options),
    )  # fmt: skip
