"""Rotary position embedding in the native module (csrc/*/rope.*)."""

from __future__ import annotations

from torch import Tensor

from ..native import KERNELS, as_rows, place
from .placement import Placement


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
    placement: Placement,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
    backend: str,
    out: Tensor,
) -> None:
    inputs = q, k, v, *placement, k_cache, v_cache
    KERNELS[backend].rope_append(*inputs, interleaved, out, *place(q))
