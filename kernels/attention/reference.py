"""Attention in plain PyTorch: the specification of ``flash_attention`` and ``flash_decode``."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Window, bounds


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``: out like q, lse ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``) in float32 or wider."""
    left, right = bounds("flash_attention", causal, window)
    if cu_seqlens_q is None:
        seen = _visible(q.shape[1], k.shape[1], left, right, q.device)
        return _attend(q, k, v, seen, scale, softcap, sinks)
    seen = _visible_packed(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], left, right)
    out, lse = _attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), seen, scale, softcap, sinks)
    return out.squeeze(0), lse.squeeze(0)


def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, of keys of which only the first ``seqlens`` ``[batch]`` hold something.

    With ``block_table`` they lie in pages; those of a page that is not there are NaN where a query sees them.
    """
    left, right = bounds("flash_decode", causal, window)
    if block_table is not None and seqlens is not None:
        begin, end = pages_read(seqlens, q.shape[1], left, k.shape[1], block_table.shape[1])
        k, v = (_gathered(pool, block_table, begin, end) for pool in (k, v))
    capacity = torch.arange(k.shape[1], device=k.device)
    if seqlens is None:
        seqlens = torch.full((q.shape[0],), k.shape[1], device=q.device)
    seqlens = seqlens.clamp(0, k.shape[1])
    at_q = seqlens.unsqueeze(1) - q.shape[1] + torch.arange(q.shape[1], device=q.device)
    empty = capacity >= seqlens.unsqueeze(1)
    seen = (_band(at_q.unsqueeze(2) - capacity, left, right) & ~empty.unsqueeze(1)).unsqueeze(1)
    v = v.masked_fill(empty.view(*k.shape[:2], 1, 1), 0.0)  # it may hold NaN, and 0 · NaN is NaN
    return _attend(q, k, v, seen, scale, softcap, sinks)


def pages_read(seqlens: Tensor, seq_q: int, left: int, page_size: int, columns: int) -> tuple[Tensor, Tensor]:
    """``[batch]``: from which column of the block table to which, excluded, queries see keys."""
    held = seqlens.long().clamp(0, columns * page_size)
    return (held - seq_q - left).clamp(min=0) // page_size, (held + page_size - 1) // page_size


def _gathered(pool: Tensor, block_table: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """``[batch, capacity, ...]``: 0 in pages that no query sees, NaN in those that are not in the pool."""
    column = torch.arange(block_table.shape[1], device=pool.device)
    hidden = (column < begin.unsqueeze(1)) | (column >= end.unsqueeze(1))
    missing = (block_table < 0) | (block_table >= len(pool))
    shape = (*block_table.shape, *[1] * (pool.dim() - 1))
    if len(pool) == 0:
        pool = pool.new_zeros(1, *pool.shape[1:])
    found = pool[block_table.long().clamp(0, len(pool) - 1)]
    found = found.masked_fill(missing.view(shape), float("nan")).masked_fill(hidden.view(shape), 0.0)
    return found.flatten(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``seen`` broadcasts to ``[batch, heads, seq_q, seq_k]``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    kw, vw = (t.to(wide).repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), kw) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    logits = scores
    if sinks is not None:  # one more logit per head: it takes its share of the sum and has no value
        logits = torch.cat([scores, sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    # A row that sees nothing has lse = -inf: give it 0, and no NaN in its gradient.
    probs = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return torch.einsum("bhqk,bkhd->bqhd", probs, vw).to(q.dtype), lse


def _band(behind: Tensor, left: int, right: int) -> Tensor:
    """What a query sees, by how far the key lies behind it (negative: ahead)."""
    return (behind <= left) & (behind >= -right)


def _visible(seq_q: int, seq_k: int, left: int, right: int, device: torch.device) -> Tensor:
    """``[seq_q, seq_k]``; the last query stands at the last key (bottom-right aligned)."""
    at_q = torch.arange(seq_k - seq_q, seq_k, device=device)
    return _band(at_q.unsqueeze(1) - torch.arange(seq_k, device=device), left, right)


def _visible_packed(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, left: int, right: int) -> Tensor:
    """``[total_q, total_k]``: each sequence sees itself alone, bottom-right aligned."""
    token_q, token_k = (torch.arange(n, device=cu_q.device) for n in (total_q, total_k))
    doc_q, doc_k = (torch.searchsorted(cu, t, right=True) - 1 for cu, t in ((cu_q, token_q), (cu_k, token_k)))
    # Positions counted back from the end of the sequence make the two ends meet.
    from_end_q, from_end_k = cu_q[doc_q + 1] - token_q, cu_k[doc_k + 1] - token_k
    seen = _band(from_end_k - from_end_q.unsqueeze(1), left, right)
    return seen & (doc_q.unsqueeze(1) == doc_k)
