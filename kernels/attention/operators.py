"""The operators of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import launchers, operator
from .options import Options
from .packing import Packing, check_packing

# Rows, queries times the heads that share a key, up to which the kernel for decoding is the faster one.
FEW_ROWS = 16


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    backend: str,
    *outputs: Tensor,
) -> None:
    check_packing(q, k, packing)
    q, k, v = map(in_rows, (q, k, v))
    kernels = launchers(__package__, backend)
    if packing.cu_seqlens_q is None and q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[2]:
        kernels.attention_decode(q, k, v, None, sinks, options, backend, *outputs)
    else:
        kernels.attention_forward(q, k, v, sinks, packing, options, backend, *outputs)


@operator(strided="q k v", launch=_launch_forward)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out``; ``lse``, float32, ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``). ``sinks`` are float32."""
    return _out_and_lse(q, v)


def _launch_backward(
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
    check_packing(q, k, packing)
    dout, q, k, v = map(in_rows, (dout, q, k, v))
    rest = out, lse, packing, options, deterministic, backend, *grads
    launchers(__package__, backend).attention_backward(dout, dlse, q, k, v, *rest)


@operator(strided="dout q k v", launch=_launch_backward)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dq``, ``dk``, ``dv`` and ``delta``.

    ``delta``, like lse, is ``dout · out - dlse``: less the gradient of a constant added to a query's scores.
    """
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


def _launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
    *outputs: Tensor,
) -> None:
    q, k, v = map(in_rows, (q, k, v))
    launchers(__package__, backend).attention_decode(q, k, v, seqlens_k, sinks, options, backend, *outputs)


@operator(strided="q k v", launch=_launch_decode)
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``, as of attention_forward; ``sinks`` are float32."""
    return _out_and_lse(q, v)


def in_rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is contiguous, as kernels want it, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _out_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
