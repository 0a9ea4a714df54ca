"""Rotary position embedding in Triton.

Memory-bound: the floor is one read and one write.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import Kernel, cdiv, multiple, power_of_two, row_offsets, rows_at

PAIRS = 1024  # of a program


@Kernel
def rotate_kernel(
    X, OUT, COS, SIN, POSITIONS,
    rows, heads, seq, max_seq, half, passed, x_inner, x_outer, x_step, out_inner, out_outer, out_step, sign,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A row is a head of a token: ``half`` pairs of columns, and ``passed`` columns that are copied.

    Tiles are [ROWS, COLS], COLS pairs or REST of those. The angles of a token are read for each of its heads, out of
    the L1 cache: to read them once would make the number of heads a constant.
    """
    half = multiple(half, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    x_row = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)[:, None]
    out_row = row_offsets(row, out_inner, out_outer, out_step, ALIGNED, NESTED)[:, None]
    token = row.to(rows.dtype) // heads  # a division of 64 bits is a call: only where there are so many rows
    position = (token % seq).to(tl.int64)
    if POSITIONS is not None:
        position = tl.load(POSITIONS + token, row < rows, other=0)
    pair = tl.arange(0, COLS)[None, :]
    there = ((position >= 0) & (position < max_seq))[:, None] & (pair < half)
    entry = (position * half)[:, None] + pair
    cos = tl.load(COS + entry, there, other=float("nan"))
    sin = tl.load(SIN + entry, there, other=float("nan")) * sign
    if INTERLEAVED:
        col = tl.arange(0, 2 * COLS)[None, :]
        mask = inside & (col < 2 * half)
        x = tl.load(X + x_row + col, mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [ROWS, COLS, 2]))
        out = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [ROWS, 2 * COLS])
        tl.store(OUT + out_row + col, out.to(OUT.dtype.element_ty), mask)
    else:
        mask = inside & (pair < half)
        a = tl.load(X + x_row + pair, mask, other=0.0).to(tl.float32)
        b = tl.load(X + x_row + half + pair, mask, other=0.0).to(tl.float32)
        tl.store(OUT + out_row + pair, (a * cos - b * sin).to(OUT.dtype.element_ty), mask)
        tl.store(OUT + out_row + half + pair, (b * cos + a * sin).to(OUT.dtype.element_ty), mask)
    if REST:
        col = tl.arange(0, REST)[None, :]
        mask = inside & (col < multiple(passed, ALIGNED))
        rest = tl.load(X + x_row + 2 * half + col, mask, other=0.0)
        tl.store(OUT + out_row + 2 * half + col, rest, mask)


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
    rows, passed = x.numel() // dim, 0 if x is out else dim - 2 * half
    cols, rest = power_of_two(half), power_of_two(passed) if passed else 0
    tile_rows = max(1, min(64, PAIRS // max(cols, rest)))
    x, out = as_rows(x), as_rows(out)
    at, *layout = rows_at(x, out, sizes=(half, passed))
    rotate_kernel(
        (cdiv(rows, tile_rows), 1, 1),
        (x, out, cos, sin, positions),
        (rows, heads, seq, max_seq, half, passed, *at, -1.0 if inverse else 1.0),
        (*layout, interleaved, tile_rows, cols, rest),
    )
