"""``swiglu``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, empty_like, function, operator
from . import reference


@backends.op("cuda", "triton", "cpu")
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · up``, computed in float32 (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate: any shape, float32, float16 or bfloat16, any strides.
        up: like gate. Of two dtypes both are promoted, as by PyTorch's product.
        backend: see ``explain``.

    Returns:
        A tensor like gate, in the dtype of both, contiguous.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call.
    """
    checks.floating("swiglu", "gate", gate, min_dim=0)
    checks.on("swiglu", "up", up, "gate", gate)
    checks.floating("swiglu", "up", up, min_dim=0)
    checks.sized("swiglu", "up", up, gate.shape)
    if gate.dtype != up.dtype:
        common = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(common), up.to(common)
    chosen = backends.select("swiglu", gate, backend, lambda b: None if gate.dim() else "it takes no scalars")
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return reference.swiglu(gate, up)
    return _swiglu(gate, up, chosen)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
        return swiglu_forward(gate, up, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.backend = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = swiglu_backward(dout, gate, up, ctx.backend)
        dgate, dup = (differentiable_once("swiglu", gate, g) for g in grads)
        return dgate, dup, None


_swiglu = function(_SwiGLU)


@operator(strided="gate up")
def swiglu_forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return empty_like(gate)


@operator(strided="dout gate up")
def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return empty_like(gate), empty_like(gate)
