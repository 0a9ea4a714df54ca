"""Rotary position embedding in plain PyTorch: the specification (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if positions is None:
        cos, sin = cos[: q.shape[-3]], sin[: q.shape[-3]]
    else:
        outside = ((positions < 0) | (positions >= len(cos))).unsqueeze(-1)
        rows = positions.long().clamp(0, max(0, len(cos) - 1))
        cos, sin = (table[rows].masked_fill(outside, float("nan")) for table in (cos, sin))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """q turned; k turned and v are written into the caches."""
    q, k = rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
    pages, page_size = k_cache.shape[:2]
    written = (slots >= 0) & (slots < pages * page_size)
    slot = slots[written]
    at = slot // max(1, page_size), slot % max(1, page_size)
    k_cache[at], v_cache[at] = k[written], v[written]
    return q


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x[..., : 2 * cos.shape[-1]].to(wide)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos.to(wide), sin.to(wide)
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([out, x[..., out.shape[-1] :].to(wide)], -1).to(x.dtype)
