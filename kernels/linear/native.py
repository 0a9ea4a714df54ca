"""The linear layer of inference in the native module (csrc/cpu/linear.cpp)."""

from __future__ import annotations

from torch import Tensor

from ..native import KERNELS, as_rows
from .packed import Stored


def packed_linear_forward(
    x: Tensor, weight: Stored, bias: Tensor | None, wide: bool, backend: str, out: Tensor
) -> None:
    KERNELS[backend].linear(as_rows(x), weight.data, weight.scales, bias, weight.gated, out, 0, 0)
