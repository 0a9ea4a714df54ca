"""Rotary position embedding in Triton.

Memory-bound: the floor is one read and one write. A program rotates all heads of a few tokens, whose angles it
reads once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import on_device, row_offsets, row_strides

PAIRS = 2048  # of a program


@triton.jit
def rotate_kernel(
    X, OUT, COS, SIN, POSITIONS,
    tokens, seq, heads, max_seq, x_inner, x_outer, x_step, out_inner, out_outer, out_step, sign,
    HALF: tl.constexpr, PASSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """PASSED columns after the pairs are copied; tiles are [TOKENS, HEADS, COLS], COLS pairs or REST of those."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = (token * heads)[:, None] + head[None, :]
    inside = (token < tokens)[:, None] & (head < heads)[None, :]
    x_row = row_offsets(row, x_inner, x_outer, x_step)[:, :, None]
    out_row = row_offsets(row, out_inner, out_outer, out_step)[:, :, None]
    position = token % seq
    if POSITIONS is not None:
        position = tl.load(POSITIONS + token, token < tokens, other=0)
    pair = tl.arange(0, COLS)
    there = ((position >= 0) & (position < max_seq))[:, None] & (pair < HALF)[None, :]
    entry = (position * HALF)[:, None] + pair[None, :]
    cos = tl.load(COS + entry, there, other=float("nan"))[:, None, :]
    sin = tl.load(SIN + entry, there, other=float("nan"))[:, None, :] * sign
    if INTERLEAVED:
        col = tl.arange(0, 2 * COLS)[None, None, :]
        mask = inside[:, :, None] & (col < 2 * HALF)
        x = tl.load(X + x_row + col, mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [TOKENS, HEADS, COLS, 2]))
        out = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [TOKENS, HEADS, 2 * COLS])
        tl.store(OUT + out_row + col, out.to(OUT.dtype.element_ty), mask)
    else:
        col = pair[None, None, :]
        mask = inside[:, :, None] & (col < HALF)
        a = tl.load(X + x_row + col, mask, other=0.0).to(tl.float32)
        b = tl.load(X + x_row + HALF + col, mask, other=0.0).to(tl.float32)
        tl.store(OUT + out_row + col, (a * cos - b * sin).to(OUT.dtype.element_ty), mask)
        tl.store(OUT + out_row + HALF + col, (b * cos + a * sin).to(OUT.dtype.element_ty), mask)
    if PASSED:
        col = tl.arange(0, REST)[None, None, :]
        mask = inside[:, :, None] & (col < PASSED)
        rest = tl.load(X + x_row + 2 * HALF + col, mask, other=0.0)
        tl.store(OUT + out_row + 2 * HALF + col, rest, mask)


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
    (seq, heads, dim), (max_seq, half) = x.shape[-3:], cos.shape
    tokens, passed = x.numel() // (heads * dim), 0 if x is out else dim - 2 * half
    cols = max(1, triton.next_power_of_2(half))
    tile_heads = min(triton.next_power_of_2(heads), max(1, PAIRS // cols))
    tile_tokens = max(1, min(16, PAIRS // (cols * tile_heads)))
    x, out = as_rows(x), as_rows(out)
    with on_device(x):
        rotate_kernel[(triton.cdiv(tokens, tile_tokens), triton.cdiv(heads, tile_heads))](
            X=x,
            OUT=out,
            COS=cos,
            SIN=sin,
            POSITIONS=positions,
            tokens=tokens,
            seq=seq,
            heads=heads,
            max_seq=max_seq,
            sign=-1.0 if inverse else 1.0,
            HALF=half,
            PASSED=passed,
            INTERLEAVED=interleaved,
            TOKENS=tile_tokens,
            HEADS=tile_heads,
            COLS=cols,
            REST=max(1, triton.next_power_of_2(passed)),
            **row_strides(x=x, out=out),
        )
