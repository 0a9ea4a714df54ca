"""SwiGLU in Triton. Memory-bound: forward moves two reads and one write, backward three reads and two writes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import Kernel, cdiv, multiple, power_of_two, row_offsets, rows_at

ELEMENTS = 2048  # of a program's tile


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def place(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of a program's tile, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    return row, col, (row < rows)[:, None] & (col < cols)


@Kernel
def forward_kernel(
    GATE, UP, OUT, rows, cols, gate_inner, gate_outer, gate_step, up_inner, up_outer, up_step,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row, col, mask = place(rows, cols, ROWS, COLS)
    gate_at = row_offsets(row, gate_inner, gate_outer, gate_step, ALIGNED, NESTED)[:, None] + col
    up_at = row_offsets(row, up_inner, up_outer, up_step, ALIGNED, NESTED)[:, None] + col
    gate = tl.load(GATE + gate_at, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask, other=0.0).to(tl.float32)
    out = gate * sigmoid(gate) * up
    tl.store(OUT + (row * cols)[:, None] + col, out.to(OUT.dtype.element_ty), mask)


@Kernel
def backward_kernel(
    DOUT, GATE, UP, DGATE, DUP, rows, cols, dout_inner, dout_outer, dout_step,
    gate_inner, gate_outer, gate_step, up_inner, up_outer, up_step,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row, col, mask = place(rows, cols, ROWS, COLS)
    dout_at = row_offsets(row, dout_inner, dout_outer, dout_step, ALIGNED, NESTED)[:, None] + col
    gate_at = row_offsets(row, gate_inner, gate_outer, gate_step, ALIGNED, NESTED)[:, None] + col
    up_at = row_offsets(row, up_inner, up_outer, up_step, ALIGNED, NESTED)[:, None] + col
    dout = tl.load(DOUT + dout_at, mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + gate_at, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    silu = gate * s
    out_at = (row * cols)[:, None] + col
    tl.store(DUP + out_at, (dout * silu).to(DUP.dtype.element_ty), mask)
    tl.store(DGATE + out_at, (dout * up * (s + silu * (1.0 - s))).to(DGATE.dtype.element_ty), mask)


def _tile(cols: int) -> tuple[int, int]:
    """Rows and columns."""
    block = min(ELEMENTS, power_of_two(cols))
    return ELEMENTS // block if block >= 32 else 64, block


def swiglu_forward(gate: Tensor, up: Tensor, backend: str, out: Tensor) -> None:
    gate, up = as_rows(gate), as_rows(up)
    cols = out.shape[-1]
    at, *layout = rows_at(gate, up, sizes=(cols,))
    rows = out.numel() // cols
    tile_rows, tile_cols = _tile(cols)
    forward_kernel(
        (cdiv(rows, tile_rows), cdiv(cols, tile_cols), 1),
        (gate, up, out),
        (rows, cols, *at),
        (*layout, tile_rows, tile_cols),
    )


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str, dgate: Tensor, dup: Tensor) -> None:
    dout, gate, up = as_rows(dout), as_rows(gate), as_rows(up)
    cols = dgate.shape[-1]
    at, *layout = rows_at(dout, gate, up, sizes=(cols,))
    rows = dgate.numel() // cols
    tile_rows, tile_cols = _tile(cols)
    backward_kernel(
        (cdiv(rows, tile_rows), cdiv(cols, tile_cols), 1),
        (dout, gate, up, dgate, dup),
        (rows, cols, *at),
        (*layout, tile_rows, tile_cols),
    )
