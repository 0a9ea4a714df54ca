"""Kernel launchers as operators of ``torch.library``, so that torch.compile and export see through them.

``Library.define``/``impl`` and not the ``custom_op`` decorator: a call costs 2 µs instead of 62.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastllm", "DEF")


def register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Register a launcher as ``torch.ops.fastllm.<name>``.

    The launcher allocates its outputs and calls a kernel; ``fake`` allocates the same outputs and calls
    none. Differentiation is the business of the op's ``torch.autograd.Function``.
    """

    def define(launcher: Callable) -> Callable:
        name = schema[: schema.index("(")]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastllm::{name}", fake, lib=_library)
        return launcher

    return define


class _Once(torch.autograd.Function):
    """Hands gradients through, and says so when somebody differentiates them again."""

    @staticmethod
    def forward(ctx: Any, name: str, like: Tensor, grad: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.name}: its kernels have no second derivative; call it with backend='torch', "
            "which PyTorch can differentiate twice"
        )


def differentiable_once(name: str, like: Tensor, grad: Tensor | None) -> Tensor | None:
    """``grad``, computed by a kernel from ``like`` (a tensor of the graph), so that its own gradient raises."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _Once.apply(name, like, grad)
