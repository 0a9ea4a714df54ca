"""SwiGLU in the native module (csrc/*/swiglu.*)."""

from __future__ import annotations

from torch import Tensor

from ..native import DTYPE_CODES, KERNELS, as_rows, place


def forward(gate: Tensor, up: Tensor, out: Tensor, backend: str) -> None:
    gate, gate_rows = as_rows(gate)
    up, up_rows = as_rows(up)
    KERNELS[backend].swiglu_forward(gate_rows, up_rows, out.data_ptr(), *_size(gate), *place(gate))


def backward(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, backend: str) -> None:
    dout, dout_rows = as_rows(dout)
    gate, gate_rows = as_rows(gate)
    up, up_rows = as_rows(up)
    KERNELS[backend].swiglu_backward(
        dout_rows, gate_rows, up_rows, dgate.data_ptr(), dup.data_ptr(), *_size(gate), *place(gate)
    )


def _size(x: Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[-1], x.shape[-1], DTYPE_CODES[x.dtype]
