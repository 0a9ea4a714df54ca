"""Rotary position embedding in the native module (csrc/*/rope.*)."""

from __future__ import annotations

from torch import Tensor

from ..native import KERNELS, as_rows, place


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    backend: str,
    out: Tensor,
) -> None:
    """``out`` may be x."""
    seq, heads = x.shape[-3:-1]
    rows = as_rows(x), cos, sin, positions
    KERNELS[backend].rope(*rows, interleaved, inverse, as_rows(out), seq, heads, *place(x))


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
    backend: str,
    out: Tensor,
) -> None:
    inputs = q, k, v, cos, sin, positions, slots, k_cache, v_cache
    KERNELS[backend].rope_append(*inputs, interleaved, out, *place(q))
