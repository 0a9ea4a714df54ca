"""Rotary position embedding in Triton.

Memory-bound: the floor is one read and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import Kernel, cdiv, multiple, power_of_two, row_offsets, rows_at
from .placement import Placement

PAIRS = 1024  # of a program


@triton.jit
def turn(
    X, OUT, COS, SIN, x_row, out_row, inside, written, position, max_seq, half, passed, sign,
    ALIGNED: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A tile of rows, of which those ``inside`` are read and those ``written`` are written.

    A row is a head of a token: ``half`` pairs of columns, and ``passed`` columns that are copied. Tiles are
    [ROWS, COLS], COLS pairs or REST of those. The angles of a token are read for each of its heads, out of the L1
    cache: to read them once would make the number of heads a constant.
    """
    x_row, out_row, inside, written = x_row[:, None], out_row[:, None], inside[:, None], written[:, None]
    pair = tl.arange(0, COLS)[None, :]
    there = ((position >= 0) & (position < max_seq))[:, None] & (pair < half)
    entry = (position * half)[:, None] + pair
    cos = tl.load(COS + entry, there, other=float("nan"))
    sin = tl.load(SIN + entry, there, other=float("nan")) * sign
    if INTERLEAVED:
        col = tl.arange(0, 2 * COLS)[None, :]
        within = col < 2 * half
        x = tl.load(X + x_row + col, inside & within, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [ROWS, COLS, 2]))
        out = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [ROWS, 2 * COLS])
        tl.store(OUT + out_row + col, out.to(OUT.dtype.element_ty), written & within)
    else:
        within = pair < half
        a = tl.load(X + x_row + pair, inside & within, other=0.0).to(tl.float32)
        b = tl.load(X + x_row + half + pair, inside & within, other=0.0).to(tl.float32)
        tl.store(OUT + out_row + pair, (a * cos - b * sin).to(OUT.dtype.element_ty), written & within)
        tl.store(OUT + out_row + half + pair, (b * cos + a * sin).to(OUT.dtype.element_ty), written & within)
    if REST:
        col = tl.arange(0, REST)[None, :]
        within = col < multiple(passed, ALIGNED)
        rest = tl.load(X + x_row + 2 * half + col, inside & within, other=0.0)
        tl.store(OUT + out_row + 2 * half + col, rest, written & within)


@Kernel
def rotate_kernel(
    X, OUT, COS, SIN, POSITIONS,
    rows, heads, seq, max_seq, half, passed, x_inner, x_outer, x_step, out_inner, out_outer, out_step, sign,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    x_row = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)
    out_row = row_offsets(row, out_inner, out_outer, out_step, ALIGNED, NESTED)
    token = row.to(rows.dtype) // heads  # a division of 64 bits is a call: only where there are so many rows
    position = (token % seq).to(tl.int64)
    if POSITIONS is not None:
        position = tl.load(POSITIONS + token, inside, other=0)
    turn(
        X, OUT, COS, SIN, x_row, out_row, inside, inside, position, max_seq, multiple(half, ALIGNED), passed, sign,
        ALIGNED, INTERLEAVED, ROWS, COLS, REST,
    )  # fmt: skip


@Kernel
def append_kernel(
    Q, K, V, OUT, K_CACHE, V_CACHE, COS, SIN, POSITIONS, SLOTS,
    rows, tokens, heads, kv_heads, blocks, kv_blocks, max_seq, half, passed, held, page_size,
    q_token, q_head, k_token, k_head, v_token, v_head, k_page, k_cell, k_to, v_page, v_cell, v_to,
    ALIGNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The first ``blocks`` programs turn queries, the next ``kv_blocks`` keys, and the rest copy values."""
    block = tl.program_id(0)
    half = multiple(half, ALIGNED)
    if block < blocks:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        narrow = row.to(rows.dtype)  # as above
        token, head = (narrow // heads).to(tl.int64), narrow % heads
        inside = token < tokens
        position = tl.load(POSITIONS + token, inside, other=0)
        x_row = token * multiple(q_token, ALIGNED) + head * multiple(q_head, ALIGNED)
        turn(
            Q, OUT, COS, SIN, x_row, row * (2 * half + multiple(passed, ALIGNED)), inside, inside, position, max_seq,
            half, passed, 1.0, ALIGNED, INTERLEAVED, ROWS, COLS, REST,
        )  # fmt: skip
        return
    values = block >= blocks + kv_blocks
    row = tl.where(values, block - blocks - kv_blocks, block - blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    narrow = row.to(rows.dtype)
    token, head = (narrow // kv_heads).to(tl.int64), narrow % kv_heads
    inside = token < tokens
    slot = tl.load(SLOTS + token, inside, other=-1)
    written = (slot >= 0) & (slot < held)
    narrow = tl.where(written, slot, 0).to(held.dtype)
    page, cell = (narrow // page_size).to(tl.int64), narrow % page_size
    if values:
        v_row = token * multiple(v_token, ALIGNED) + head * multiple(v_head, ALIGNED)
        v_out = page * multiple(v_page, ALIGNED) + cell * multiple(v_cell, ALIGNED) + head * multiple(v_to, ALIGNED)
        col = tl.arange(0, DIM)[None, :]
        within = written[:, None] & (col < 2 * half + multiple(passed, ALIGNED))
        v = tl.load(V + v_row[:, None] + col, within, other=0.0)
        tl.store(V_CACHE + v_out[:, None] + col, v, within)
    else:
        position = tl.load(POSITIONS + token, inside, other=0)
        x_row = token * multiple(k_token, ALIGNED) + head * multiple(k_head, ALIGNED)
        out_row = page * multiple(k_page, ALIGNED) + cell * multiple(k_cell, ALIGNED) + head * multiple(k_to, ALIGNED)
        turn(
            K, K_CACHE, COS, SIN, x_row, out_row, inside, written, position, max_seq, half, passed, 1.0,
            ALIGNED, INTERLEAVED, ROWS, COLS, REST,
        )  # fmt: skip


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
    (tokens, heads, dim), (max_seq, half) = q.shape, placement.cos.shape
    pages, page_size, kv_heads, _ = k_cache.shape
    passed = dim - 2 * half
    cols, rest, whole = power_of_two(half), power_of_two(passed) if passed else 0, power_of_two(dim)
    tile_rows = max(1, min(64, PAIRS // max(cols, rest)))
    blocks, kv_blocks = cdiv(tokens * heads, tile_rows), cdiv(tokens * kv_heads, tile_rows)
    strides = [step for x in (q, k, v, k_cache, v_cache) for step in x.stride()[:-1]]
    aligned = not any(n % 8 for n in (half, passed, *strides))
    sizes = tokens * max(heads, kv_heads), tokens, heads, max(1, kv_heads), blocks, kv_blocks
    append_kernel(
        (blocks + 2 * kv_blocks, 1, 1),
        (q, k, v, out, k_cache, v_cache, *placement),
        (*sizes, max_seq, half, passed, pages * page_size, max(1, page_size), *strides),
        (aligned, interleaved, tile_rows, cols, rest, whole),
    )
