"""Rotary position embedding in the native module (csrc/*/rope.*)."""

from __future__ import annotations

from torch import Tensor

from ..native import DTYPE_CODES, KERNELS, as_rows, place, pointer


def turn(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    backend: str,
) -> None:
    x, x_rows = as_rows(x)
    _, out_rows = as_rows(out)
    (seq, heads, cols), (max_seq, half) = x.shape[-3:], cos.shape
    KERNELS[backend].rope(
        x_rows, out_rows, cos.data_ptr(), sin.data_ptr(), pointer(positions),
        x.numel() // cols, cols, heads, seq, half, max_seq, interleaved, inverse, DTYPE_CODES[x.dtype], *place(x),
    )  # fmt: skip
