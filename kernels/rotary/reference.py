"""Rotary position embedding in plain PyTorch: the specification (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = slice(q.shape[-3]) if positions is None else positions.long()
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x[..., : 2 * cos.shape[-1]].to(wide)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos.to(wide), sin.to(wide)
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([out.to(x.dtype), x[..., out.shape[-1] :]], -1)
