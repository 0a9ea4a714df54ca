"""Attention in the native module: C++ on CPUs (csrc/cpu/attention*.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import KERNELS, contiguous, place
from .options import Options


def _index(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


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
    inputs = q, k, v, contiguous(sinks), _index(cu_seqlens_q), _index(cu_seqlens_k)
    KERNELS[backend].attention_forward(*inputs, options, out, lse, *place(q))


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
    inputs = dout, dlse, q, k, v, out, lse, _index(cu_seqlens_q), _index(cu_seqlens_k)
    KERNELS[backend].attention_backward(*inputs, options, dq, dk, dv, delta, *place(q))


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
    inputs = q, k, v, _index(seqlens_k), contiguous(sinks)
    KERNELS[backend].attention_decode(*inputs, options, out, lse, *place(q))
