"""Attention in the native module: C++ on CPUs (csrc/cpu/attention*.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import KERNELS, place
from .options import Options
from .packing import Packing


def _int64(*indices: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(torch.int64) for x in indices]


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
    inputs = dout, dlse, q, k, v, out, lse, *_int64(*packing[:2])
    KERNELS[backend].attention_backward(*inputs, options, *grads, *place(q))


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
    *outputs: Tensor | None,
) -> None:
    KERNELS[backend].attention_decode(q, k, v, *_int64(seqlens_k), sinks, options, *outputs, *place(q))
