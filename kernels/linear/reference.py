"""The linear layer of inference in plain PyTorch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def packed_linear(x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """``matrix``: [out_features, in_features], in the dtype of x or, with ``scales``, int8."""
    if scales is None:
        return F.linear(x, matrix, bias)
    out = F.linear(x.float(), matrix.float()) * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)
