"""The operators of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import empty_like, launchers, operator
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
    differentiated: bool,
    wants_lse: bool,
    backend: str,
    *outputs: Tensor | None,
) -> None:
    q, k, v = in_rows(q, k, v)
    kernels = launchers(__package__, backend)
    packed = packing.cu_seqlens_q is not None
    if packed:
        check_packing(q, k, packing)
    if not (packed or differentiated) and q.shape[1] * q.shape[2] <= FEW_ROWS * k.shape[2]:
        kernels.attention_decode(q, k, v, None, None, sinks, options, backend, *outputs)
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
    differentiated: bool,
    wants_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``out``; ``lse``, float32, ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``). ``sinks`` are float32.

    ``differentiated``: by the kernel that gives a sequence the same bits alone and packed.
    """
    return _out_and_lse(q, v, wants_lse)


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
    dout, q, k, v = in_rows(dout, q, k, v)
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
    return empty_like(q), empty_like(k), empty_like(v), empty_like(lse)


def _launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    wants_lse: bool,
    backend: str,
    *outputs: Tensor | None,
) -> None:
    q, k, v = in_rows(q, k, v)
    launchers(__package__, backend).attention_decode(q, k, v, seqlens_k, block_table, sinks, options, backend, *outputs)


@operator(strided="q k v", launch=_launch_decode)
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    wants_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``out`` and ``lse``, as of attention_forward; ``sinks`` are float32, ``block_table`` is int32."""
    return _out_and_lse(q, v, wants_lse)


def in_rows(*tensors: Tensor) -> list[Tensor]:
    """Those whose last dimension is contiguous, as kernels want it, themselves; copies of others."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def _out_and_lse(q: Tensor, v: Tensor, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    # sizes one by one: PyTorch reads a tuple of them more slowly
    *batch, seq, heads, dim = q.shape
    dim_v = v.shape[-1]
    out = empty_like(q) if dim == dim_v else torch.empty(*batch, seq, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(*batch, heads, seq, dtype=torch.float32, device=q.device) if wants_lse else None
    return out, lse
