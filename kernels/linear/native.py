"""The linear layer of inference in the native module (csrc/cpu/linear.cpp)."""

from __future__ import annotations

from torch import Tensor

from ..native import KERNELS, as_rows


def packed_linear_forward(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    panels: bool,
    wide: bool,
    backend: str,
    out: Tensor,
) -> None:
    KERNELS[backend].linear(as_rows(x), data, scales, bias, out, 0, 0)
