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
from ..triton_launch import on_device, processors, row_offsets, row_strides, tile

# The longest row that a program holds: forward one value a column, backward four (dy, x, weight, sum).
LONGEST_FORWARD, LONGEST_BACKWARD = 16384, 8192


@triton.jit
def _sum_of(X, R, x_at, r_at, mask, HAS_RESIDUAL: tl.constexpr):
    """x + residual, rounded to the dtype of the residual, in float32."""
    h = tl.load(X + x_at, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h = (h + tl.load(R + r_at, mask, other=0.0).to(tl.float32)).to(R.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _weight(W, offset, col, cols, HAS_WEIGHT: tl.constexpr):
    w = tl.full(col.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(W + col, col < cols, other=0.0).to(tl.float32) + offset
    return w[None, :]


@triton.jit
def forward_kernel(
    X, R, W, Y, H, RSTD,
    rows, cols, x_inner, x_outer, x_step, r_inner, r_outer, r_step, eps, offset,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    in_rows = (row < rows)[:, None]
    x_row = row_offsets(row, x_inner, x_outer, x_step)[:, None]
    r_row = row_offsets(row, r_inner, r_outer, r_step)[:, None]
    out_row = (row * cols)[:, None]
    if LOOP:
        squares = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, cols, COLS):
            at = start + col[None, :]
            mask = in_rows & (at < cols)
            h = _sum_of(X, R, x_row + at, r_row + at, mask, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(H + out_row + at, h.to(H.dtype.element_ty), mask)
            squares += h * h
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / cols + eps)
        for start in range(0, cols, COLS):
            at = start + col[None, :]
            mask = in_rows & (at < cols)
            h = _sum_of(X, R, x_row + at, r_row + at, mask, HAS_RESIDUAL)
            y = h * rstd[:, None] * _weight(W, offset, start + col, cols, HAS_WEIGHT)
            tl.store(Y + out_row + at, y.to(Y.dtype.element_ty), mask)
    else:
        at = col[None, :]
        mask = in_rows & (at < cols)
        h = _sum_of(X, R, x_row + at, r_row + at, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(H + out_row + at, h.to(H.dtype.element_ty), mask)
        rstd = 1.0 / tl.sqrt(tl.sum(h * h, 1) / cols + eps)
        y = h * rstd[:, None] * _weight(W, offset, col, cols, HAS_WEIGHT)
        tl.store(Y + out_row + at, y.to(Y.dtype.element_ty), mask)
    tl.store(RSTD + row, rstd, row < rows)


@triton.jit
def backward_kernel(
    DY, X, W, RSTD, DH, DX, PARTIALS,
    rows, cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step, dh_inner, dh_outer, dh_step, offset,
    HAS_WEIGHT: tl.constexpr, HAS_DH: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: dx, and one row of partial sums of dweight per program."""
    col = tl.arange(0, COLS)
    at = col[None, :]
    w = _weight(W, offset, col, cols, HAS_WEIGHT)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (at < cols)
        dy_at = row_offsets(row, dy_inner, dy_outer, dy_step)[:, None] + at
        x_at = row_offsets(row, x_inner, x_outer, x_step)[:, None] + at
        rstd = tl.load(RSTD + row, row < rows, other=0.0)[:, None]
        dy = tl.load(DY + dy_at, mask, other=0.0).to(tl.float32)
        xhat = tl.load(X + x_at, mask, other=0.0).to(tl.float32) * rstd
        g = dy * w
        dx = rstd * (g - xhat * (tl.sum(g * xhat, 1) / cols)[:, None])
        if HAS_DH:
            dh_at = row_offsets(row, dh_inner, dh_outer, dh_step)[:, None] + at
            dx += tl.load(DH + dh_at, mask, other=0.0).to(tl.float32)
        tl.store(DX + (row * cols)[:, None] + at, dx.to(DX.dtype.element_ty), mask)
        if WEIGHT_GRAD:
            dweight += dy * xhat
    if WEIGHT_GRAD:
        tl.store(PARTIALS + tl.program_id(0).to(tl.int64) * cols + col, tl.sum(dweight, 0), col < cols)


@triton.jit
def long_backward_kernel(
    DY, X, W, RSTD, DH, DX,
    cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step, dh_inner, dh_outer, dh_step, offset,
    HAS_WEIGHT: tl.constexpr, HAS_DH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx of one row, read twice."""
    row = tl.program_id(0).to(tl.int64)
    dy_row = DY + row_offsets(row, dy_inner, dy_outer, dy_step)
    x_row = X + row_offsets(row, x_inner, x_outer, x_step)
    dh_row = row_offsets(row, dh_inner, dh_outer, dh_step)
    rstd = tl.load(RSTD + row)
    dot = tl.zeros([1, COLS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        at = col[None, :]
        g = tl.load(dy_row + at, at < cols, other=0.0).to(tl.float32) * _weight(W, offset, col, cols, HAS_WEIGHT)
        dot += g * tl.load(x_row + at, at < cols, other=0.0).to(tl.float32)
    pull = (tl.sum(dot, 1) * rstd * rstd / cols)[:, None]
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        at = col[None, :]
        g = tl.load(dy_row + at, at < cols, other=0.0).to(tl.float32) * _weight(W, offset, col, cols, HAS_WEIGHT)
        dx = rstd * (g - tl.load(x_row + at, at < cols, other=0.0).to(tl.float32) * pull)
        if HAS_DH:
            dx += tl.load(DH + dh_row + at, at < cols, other=0.0).to(tl.float32)
        tl.store(DX + row * cols + at, dx.to(DX.dtype.element_ty), at < cols)


@triton.jit
def long_dweight_kernel(
    DY, X, RSTD, PARTIALS,
    rows, cols, dy_inner, dy_outer, dy_step, x_inner, x_outer, x_step,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight: program (i, p) sums a strip of columns over every p-th tile of rows."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    at = col[None, :]
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (at < cols)
        dy_at = row_offsets(row, dy_inner, dy_outer, dy_step)[:, None] + at
        x_at = row_offsets(row, x_inner, x_outer, x_step)[:, None] + at
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
    backend: str,
    y: Tensor,
    h: Tensor,
    rstd: Tensor,
) -> None:
    rows, cols = rstd.numel(), x.shape[-1]
    x, residual = as_rows(x), as_rows(residual)
    config = tile(cols, LONGEST_FORWARD)
    with on_device(x):
        forward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            X=x,
            R=residual,
            W=weight,
            Y=y,
            H=h,
            RSTD=rstd,
            rows=rows,
            cols=cols,
            eps=eps,
            offset=weight_offset,
            HAS_WEIGHT=weight is not None,
            HAS_RESIDUAL=residual is not None,
            LOOP=cols > config["COLS"],
            **row_strides(x=x, r=residual),
            **config,
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
    dweight: Tensor,
) -> None:
    rows, cols = rstd.numel(), x.shape[-1]
    wanted = dweight.numel() > 0
    if rows == 0:
        dweight.zero_()
        return
    dy, x, dh = as_rows(dy), as_rows(x), as_rows(dh)
    config = tile(cols, LONGEST_BACKWARD)
    programs = min(triton.cdiv(rows, config["ROWS"]), 4 * processors(x.device))
    partials = torch.empty(programs if wanted else 0, cols, dtype=torch.float32, device=x.device)
    given = {"DY": dy, "X": x, "RSTD": rstd, "cols": cols, **row_strides(dy=dy, x=x)}
    for_dx = {
        "W": weight,
        "DH": dh,
        "DX": dx,
        "offset": weight_offset,
        "HAS_WEIGHT": weight is not None,
        "HAS_DH": dh is not None,
        **row_strides(dh=dh),
    }
    with on_device(x):
        if cols <= config["COLS"]:
            backward_kernel[(programs,)](PARTIALS=partials, rows=rows, WEIGHT_GRAD=wanted, **given, **for_dx, **config)
        else:
            long_backward_kernel[(rows,)](COLS=config["COLS"], num_warps=config["num_warps"], **given, **for_dx)
            if wanted:
                strips = triton.cdiv(cols, 256)
                partials = partials[: max(1, 4 * processors(x.device) // strips)]
                long_dweight_kernel[(strips, len(partials))](
                    PARTIALS=partials, rows=rows, ROWS=8, COLS=256, num_warps=4, **given
                )
    if wanted:
        torch.sum(partials, 0, out=dweight) if dweight.dtype == torch.float32 else dweight.copy_(partials.sum(0))
