"""``swiglu``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, register
from . import native, reference


@backends.op("cuda", "triton", "cpu")
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · up``, computed in float32 (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate: any shape, float32, float16 or bfloat16, any strides.
        up: like gate.
        backend: see ``explain``.

    Returns:
        A tensor like gate, contiguous.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call.
    """
    checks.floating("swiglu", "gate", gate, min_dim=0)
    checks.like("swiglu", "up", up, "gate", gate)
    chosen = backends.select("swiglu", gate, backend, lambda b: None if gate.dim() else "it takes no scalars")
    if isinstance(chosen, backends.Explanation):
        return chosen
    if chosen == "torch":
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate, up, chosen)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return torch.ops.fastllm.swiglu_forward(gate, up, backend)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = torch.ops.fastllm.swiglu_backward(dout, gate, up, ctx.backend)
        dgate, dup = (differentiable_once("swiglu", gate, g) for g in grads)
        return dgate, dup, None


@register(
    "swiglu_forward(Tensor gate, Tensor up, str backend) -> Tensor",
    fake=lambda gate, up, backend: gate.new_empty(gate.shape),
)
def _forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        _kernels(backend).forward(gate, up, out, backend)
    return out


@register(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up, str backend) -> (Tensor dgate, Tensor dup)",
    fake=lambda dout, gate, up, backend: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
def _backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dgate.numel():
        _kernels(backend).backward(dout, gate, up, dgate, dup, backend)
    return dgate, dup


def _kernels(backend: str) -> ModuleType:
    if backend == "triton":
        from . import triton_kernels  # needs triton, which the other backends do without

        return triton_kernels
    return native
