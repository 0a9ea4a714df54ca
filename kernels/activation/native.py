"""SwiGLU in the native module (csrc/*/swiglu.*)."""

from __future__ import annotations

from torch import Tensor

from ..native import KERNELS, as_rows, place


def swiglu_forward(gate: Tensor, up: Tensor, backend: str, out: Tensor) -> None:
    KERNELS[backend].swiglu_forward(as_rows(gate), as_rows(up), out, *place(out))


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str, dgate: Tensor, dup: Tensor) -> None:
    KERNELS[backend].swiglu_backward(as_rows(dout), as_rows(gate), as_rows(up), dgate, dup, *place(dgate))
