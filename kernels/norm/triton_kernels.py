"""RMSNorm in Triton.

Memory-bound: the floor is one read and one write of the tensor forward, two reads and one write backward.
A program holds a tile of whole rows in registers between the reduction and the write. Rows too long for
that are read twice (the second read comes from the L2 cache), and their weight gradient has a kernel of
its own, which walks down the columns. Nothing spills at any length (benchmarks/aot.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import Kernel, cdiv, multiple, processors, row_offsets, rows_at, tile

# The longest row that a program holds: forward one value a column, backward four (dy, x, weight, sum).
LONGEST_FORWARD, LONGEST_BACKWARD = 16384, 8192
STRIP, STRIP_ROWS = 256, 8  # of the kernel for the weight gradient of long rows: columns and rows of a tile


@triton.jit
def _sum_of(X, R, x_at, r_at, mask):
    """x + residual, rounded to the dtype of the residual, in float32."""
    h = tl.load(X + x_at, mask, other=0.0).to(tl.float32)
    if R is not None:
        h = (h + tl.load(R + r_at, mask, other=0.0).to(tl.float32)).to(R.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _weight(W, offset, col, cols):
    w = tl.full(col.shape, 1.0, tl.float32)
    if W is not None:
        w = tl.load(W + col, col < cols, other=0.0).to(tl.float32) + offset
    return w[None, :]


@Kernel
def forward_kernel(
    X, R, W, Y, H, RSTD,
    rows, cols, x_inner, x_outer, x_step, r_inner, r_outer, r_step, eps, offset,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    in_rows = (row < rows)[:, None]
    x_row = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)[:, None]
    r_row = row_offsets(row, r_inner, r_outer, r_step, ALIGNED, NESTED)[:, None]
    out_row = (row * cols)[:, None]
    if LOOP:
        squares = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, cols, COLS):
            at = start + col[None, :]
            mask = in_rows & (at < cols)
            h = _sum_of(X, R, x_row + at, r_row + at, mask)
            if R is not None:
                tl.store(H + out_row + at, h.to(H.dtype.element_ty), mask)
            squares += h * h
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / cols + eps)
        for start in range(0, cols, COLS):
            at = start + col[None, :]
            mask = in_rows & (at < cols)
            h = _sum_of(X, R, x_row + at, r_row + at, mask)
            y = h * rstd[:, None] * _weight(W, offset, start + col, cols)
            tl.store(Y + out_row + at, y.to(Y.dtype.element_ty), mask)
    else:
        at = col[None, :]
        mask = in_rows & (at < cols)
        h = _sum_of(X, R, x_row + at, r_row + at, mask)
        if R is not None:
            tl.store(H + out_row + at, h.to(H.dtype.element_ty), mask)
        rstd = 1.0 / tl.sqrt(tl.sum(h * h, 1) / cols + eps)
        y = h * rstd[:, None] * _weight(W, offset, col, cols)
        tl.store(Y + out_row + at, y.to(Y.dtype.element_ty), mask)
    if RSTD is not None:
        tl.store(RSTD + row, rstd, row < rows)


@Kernel
def backward_kernel(
    DY, X, W, RSTD, DH, DX, PARTIALS,
    rows, cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step, dh_inner, dh_outer, dh_step, offset,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: dx, and one row of partial sums of dweight per program.

    Two stages: a program loads its next rows while it works, since few programs share a multiprocessor.
    """
    cols = multiple(cols, ALIGNED)
    col = tl.arange(0, COLS)
    at = col[None, :]
    w = _weight(W, offset, col, cols)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=2):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (at < cols)
        dy_at = row_offsets(row, dy_inner, dy_outer, dy_step, ALIGNED, NESTED)[:, None] + at
        x_at = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)[:, None] + at
        rstd = tl.load(RSTD + row, row < rows, other=0.0)[:, None]
        dy = tl.load(DY + dy_at, mask, other=0.0).to(tl.float32)
        xhat = tl.load(X + x_at, mask, other=0.0).to(tl.float32) * rstd
        g = dy * w
        dx = rstd * (g - xhat * (tl.sum(g * xhat, 1) / cols)[:, None])
        if DH is not None:
            dh_at = row_offsets(row, dh_inner, dh_outer, dh_step, ALIGNED, NESTED)[:, None] + at
            dx += tl.load(DH + dh_at, mask, other=0.0).to(tl.float32)
        tl.store(DX + (row * cols)[:, None] + at, dx.to(DX.dtype.element_ty), mask)
        if PARTIALS is not None:
            dweight += dy * xhat
    if PARTIALS is not None:
        tl.store(PARTIALS + tl.program_id(0).to(tl.int64) * cols + col, tl.sum(dweight, 0), col < cols)


@Kernel
def long_backward_kernel(
    DY, X, W, RSTD, DH, DX,
    cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step, dh_inner, dh_outer, dh_step, offset,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of one row, read twice."""
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    dy_row = DY + row_offsets(row, dy_inner, dy_outer, dy_step, ALIGNED, NESTED)
    x_row = X + row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)
    dh_row = row_offsets(row, dh_inner, dh_outer, dh_step, ALIGNED, NESTED)
    rstd = tl.load(RSTD + row)
    dot = tl.zeros([1, COLS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        at = col[None, :]
        g = tl.load(dy_row + at, at < cols, other=0.0).to(tl.float32) * _weight(W, offset, col, cols)
        dot += g * tl.load(x_row + at, at < cols, other=0.0).to(tl.float32)
    pull = (tl.sum(dot, 1) * rstd * rstd / cols)[:, None]
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        at = col[None, :]
        g = tl.load(dy_row + at, at < cols, other=0.0).to(tl.float32) * _weight(W, offset, col, cols)
        dx = rstd * (g - tl.load(x_row + at, at < cols, other=0.0).to(tl.float32) * pull)
        if DH is not None:
            dx += tl.load(DH + dh_row + at, at < cols, other=0.0).to(tl.float32)
        tl.store(DX + row * cols + at, dx.to(DX.dtype.element_ty), at < cols)


@Kernel
def long_dweight_kernel(
    DY, X, RSTD, PARTIALS,
    rows, cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight: program (i, p) sums a strip of columns over every p-th tile of rows."""
    cols = multiple(cols, ALIGNED)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    at = col[None, :]
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=2):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (at < cols)
        dy_at = row_offsets(row, dy_inner, dy_outer, dy_step, ALIGNED, NESTED)[:, None] + at
        x_at = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)[:, None] + at
        rstd = tl.load(RSTD + row, row < rows, other=0.0)[:, None]
        dy = tl.load(DY + dy_at, mask, other=0.0).to(tl.float32)
        dweight += dy * tl.load(X + x_at, mask, other=0.0).to(tl.float32) * rstd
    tl.store(PARTIALS + tl.program_id(1).to(tl.int64) * cols + col, tl.sum(dweight, 0), col < cols)


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    differentiated: bool,
    backend: str,
    y: Tensor,
    h: Tensor | None,
    rstd: Tensor | None,
) -> None:
    cols = x.shape[-1]
    rows = x.numel() // cols
    x, residual = as_rows(x), as_rows(residual)
    at, *layout = rows_at(x, residual, sizes=(cols,))
    tile_rows, tile_cols, warps = tile(cols, LONGEST_FORWARD)
    forward_kernel(
        (cdiv(rows, tile_rows), 1, 1),
        (x, residual, weight, y, h, rstd),
        (rows, cols, *at, eps, weight_offset),
        (*layout, tile_rows, tile_cols, cols > tile_cols),
        warps,
    )


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    weight_offset: float,
    need_dweight: bool,
    backend: str,
    dx: Tensor,
    dweight: Tensor | None,
) -> None:
    rows, cols = rstd.numel(), x.shape[-1]
    if rows == 0:
        if dweight is not None:
            dweight.zero_()
        return
    dy, x, dh = as_rows(dy), as_rows(x), as_rows(dh)
    at, *layout = rows_at(dy, x, dh, sizes=(cols,))
    tile_rows, tile_cols, warps = tile(cols, LONGEST_BACKWARD)
    programs = min(cdiv(rows, tile_rows), 4 * processors(x.device))
    partials = None
    if dweight is not None:
        partials = torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    if cols <= tile_cols:
        backward_kernel(
            (programs, 1, 1),
            (dy, x, weight, rstd, dh, dx, partials),
            (rows, cols, *at, weight_offset),
            (*layout, tile_rows, tile_cols),
            warps,
        )
    else:
        long_backward_kernel(
            (rows, 1, 1),
            (dy, x, weight, rstd, dh, dx),
            (cols, *at, weight_offset),
            (*layout, tile_cols),
            warps,
        )
        if partials is not None:
            strips = cdiv(cols, STRIP)
            partials = partials[: max(1, 4 * processors(x.device) // strips)]
            long_dweight_kernel(
                (strips, len(partials), 1),
                (dy, x, rstd, partials),
                (rows, cols, *at[:6]),
                (*layout, STRIP_ROWS, STRIP),
            )
    if dweight is not None and partials is not None:
        torch.sum(partials, 0, out=dweight) if dweight.dtype == torch.float32 else dweight.copy_(partials.sum(0))
