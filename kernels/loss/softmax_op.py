"""``softmax``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, empty_like, function, operator
from . import reference


@backends.op("cuda", "triton", "cpu")
def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax of ``x · scale`` over the last dimension, masked; a row that sees nothing gives 0.

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16 (with ``causal``: ``[..., rows, n]``), any strides.
        scale: multiplies x first.
        causal: row i sees the columns up to ``i + n - rows`` (bottom-right aligned).
        mask: broadcast to x; boolean (True is seen) or of a floating dtype (added to ``x · scale``). It is
            read as it is, broadcast dimensions without a copy. Where it needs a gradient, PyTorch runs.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        The probabilities, in the shape and dtype of x, computed in float32.

    What causal or a boolean mask hides counts as nothing, NaN and infinity included. The backward needs the
    output alone. Rows too long for a core's or a block's memory are read twice, and their maximum and sum
    are kept up to date as they go (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call.
    """
    checks.floating("softmax", "x", x, min_dim=2 if causal else 1)
    if mask is not None:
        checks.on("softmax", "mask", mask, "x", x)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"softmax: mask must be bool or floating, not {checks.short(mask.dtype)}")
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"softmax: mask {list(mask.shape)} does not broadcast to x {list(x.shape)}")

    scale = checks.number("softmax", "scale", scale)

    def why_not(backend: str) -> str | None:
        return "mask needs a gradient" if mask is not None and mask.requires_grad else None

    chosen = backends.select("softmax", x, backend, why_not)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return reference.softmax(x, scale=scale, causal=causal, mask=mask)
    return _softmax(x, mask, scale, bool(causal), chosen)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str) -> Tensor:
        return softmax_forward(x, mask, scale, causal, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, ctx.scale, ctx.causal, ctx.backend = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        dx = softmax_backward(dy, y, ctx.scale, ctx.causal, ctx.backend)
        return differentiable_once("softmax", y, dx), None, None, None, None


_softmax = function(_Softmax)


@operator(strided="x mask")
def softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str) -> Tensor:
    return empty_like(x)


@operator(strided="dy y")
def softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool, backend: str) -> Tensor:
    return empty_like(y)
