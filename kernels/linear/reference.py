"""The linear layer of inference in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_linear(
    x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None, gated: bool, out_dtype: torch.dtype
) -> Tensor:
    """``matrix``: [out_features, in_features], in the dtype of x or, with ``scales``, int8; gated, twice the rows."""
    if gated:
        gate, out = packed_linear(x, matrix, scales, None, False, out_dtype).chunk(2, dim=-1)
        return F.silu(gate) * out
    if scales is None and out_dtype == x.dtype:
        return F.linear(x, matrix, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.linear(x.to(wide), matrix.to(wide))
    out = out if scales is None else out * scales
    return (out if bias is None else out + bias).to(out_dtype)
