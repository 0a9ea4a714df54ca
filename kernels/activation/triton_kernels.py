"""SwiGLU in Triton. Memory-bound: forward moves two reads and one write, backward three reads and two writes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import on_device, row_offsets, row_strides

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


@triton.jit
def forward_kernel(
    GATE, UP, OUT, rows, cols, gate_inner, gate_outer, gate_step, up_inner, up_outer, up_step,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = place(rows, cols, ROWS, COLS)
    gate_at = row_offsets(row, gate_inner, gate_outer, gate_step)[:, None] + col
    up_at = row_offsets(row, up_inner, up_outer, up_step)[:, None] + col
    gate = tl.load(GATE + gate_at, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask, other=0.0).to(tl.float32)
    out = gate * sigmoid(gate) * up
    tl.store(OUT + (row * cols)[:, None] + col, out.to(OUT.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    DOUT, GATE, UP, DGATE, DUP, rows, cols, dout_inner, dout_outer, dout_step,
    gate_inner, gate_outer, gate_step, up_inner, up_outer, up_step,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col, mask = place(rows, cols, ROWS, COLS)
    dout_at = row_offsets(row, dout_inner, dout_outer, dout_step)[:, None] + col
    gate_at = row_offsets(row, gate_inner, gate_outer, gate_step)[:, None] + col
    up_at = row_offsets(row, up_inner, up_outer, up_step)[:, None] + col
    dout = tl.load(DOUT + dout_at, mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + gate_at, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + up_at, mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    silu = gate * s
    out_at = (row * cols)[:, None] + col
    tl.store(DUP + out_at, (dout * silu).to(DUP.dtype.element_ty), mask)
    tl.store(DGATE + out_at, (dout * up * (s + silu * (1.0 - s))).to(DGATE.dtype.element_ty), mask)


def _tile(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a launch, and its arguments rows, cols, ROWS and COLS."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    block = min(ELEMENTS, triton.next_power_of_2(cols))
    tile = {"rows": rows, "cols": cols, "ROWS": ELEMENTS // block if block >= 32 else 64, "COLS": block}
    return (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(cols, block)), tile


def swiglu_forward(gate: Tensor, up: Tensor, backend: str, out: Tensor) -> None:
    gate, up = as_rows(gate), as_rows(up)
    grid, tile = _tile(out)
    with on_device(out):
        forward_kernel[grid](GATE=gate, UP=up, OUT=out, **row_strides(gate=gate, up=up), **tile)


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str, dgate: Tensor, dup: Tensor) -> None:
    dout, gate, up = as_rows(dout), as_rows(gate), as_rows(up)
    grid, tile = _tile(dgate)
    strides = row_strides(dout=dout, gate=gate, up=up)
    with on_device(dgate):
        backward_kernel[grid](DOUT=dout, GATE=gate, UP=up, DGATE=dgate, DUP=dup, **strides, **tile)
