"""The attention kernels as operators of torch.library: they allocate the outputs and call a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import register
from .documents import check_documents, longest
from .options import SCHEMA, Options


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out, contiguous, and lse ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``) in float32."""
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)


@register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    f" SymInt max_seqlen_q, SymInt max_seqlen_k, {SCHEMA}, str backend) -> (Tensor out, Tensor lse)",
    fake=lambda q, *_: _outputs(q),
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``sinks`` are float32; a max_seqlen of 0 is unknown."""
    check_documents(q, k, cu_seqlens_q, cu_seqlens_k)
    out, lse = _outputs(q)
    q, k, v = map(in_rows, (q, k, v))
    options = Options(scale, causal, window, softcap)
    if backend == "triton":
        from . import triton_forward

        lengths = longest(q, cu_seqlens_q, max_seqlen_q), longest(k, cu_seqlens_k, max_seqlen_k)
        triton_forward.forward(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *lengths, out, lse, *options)
    else:
        from . import native

        native.forward(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, out, lse, options, backend)
    return out, lse


def _gradients(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


@register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, {SCHEMA},"
    " bool deterministic, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta)",
    fake=lambda dout, dlse, q, k, v, out, lse, *_: _gradients(q, k, v, lse),
)
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``delta``, like lse, is ``dout · out - dlse``: less the gradient of a constant added to a query's scores."""
    grads = _gradients(q, k, v, lse)
    options = Options(scale, causal, window, softcap)
    dout, q, k, v = map(in_rows, (dout, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    if backend == "triton":
        from . import triton_backward

        lengths = longest(q, cu_seqlens_q, max_seqlen_q), longest(k, cu_seqlens_k, max_seqlen_k)
        triton_backward.backward(
            dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *lengths, *grads, *options, deterministic
        )
    else:
        from . import native

        native.backward(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *grads, options, backend)
    return grads


@register(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? seqlens_k, Tensor? sinks,"
    f" {SCHEMA}, str backend) -> (Tensor out, Tensor lse)",
    fake=lambda q, *_: _outputs(q),
)
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q)
    q, k, v = map(in_rows, (q, k, v))
    options = Options(scale, causal, window, softcap)
    if backend == "triton":
        from . import triton_decode

        triton_decode.decode(q, k, v, seqlens_k, sinks, out, lse, *options)
    else:
        from . import native

        native.decode(q, k, v, seqlens_k, sinks, out, lse, options, backend)
    return out, lse


def in_rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is contiguous, as kernels want it, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
