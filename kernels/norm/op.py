"""``rms_norm``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, differentiated, empty_like, function, operator
from . import reference


# fmt: off
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: None = None, weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor, weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None,
    weight_offset: float = 0.0, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@backends.op("cuda", "triton", "cpu")
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimension, with the residual addition before it fused in.

    ``y = h / sqrt(mean(h²) + eps) · (weight + weight_offset)`` with ``h = x``, or ``h = x + residual``
    rounded to the wider dtype of the two (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16 (float64 on the torch backend), any strides; n ≥ 1.
        weight: ``[n]``, of any of these dtypes, used in float32; None multiplies by 1.
        eps: added to the mean of squares.
        residual: in the shape of ``x``; added to it first. A float32 residual beside a narrower ``x``, as under
            autocast, stays float32: what the layers of a model add up loses nothing.
        weight_offset: added to the weight: 1.0 for Gemma's weights, which are stored less 1.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        ``y``, in the shape and dtype of ``x``; with a residual ``(y, x + residual)``, the sum in the wider dtype.
        Under autocast too: the arithmetic is float32 anyhow, and the result as narrow as what reads it.

    All arithmetic is float32. The gradient of the weight is summed in a fixed order, without atomics.
    The kernels differentiate once; the torch backend any number of times.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call.
    """
    checks.floating("rms_norm", "x", x)
    if x.shape[-1] == 0:
        raise ValueError("rms_norm: the last dimension of x is empty; it needs at least one column")
    if weight is not None:
        checks.parameter("rms_norm", "weight", weight, "x", x, (x.shape[-1],))
    if residual is not None:
        checks.on("rms_norm", "residual", residual, "x", x)
        checks.not_wider("rms_norm", "residual", residual, "x", x)
        checks.sized("rms_norm", "residual", residual, x.shape)
        if residual.dtype != x.dtype:
            residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        weight = weight.float()

    if type(eps) is not float:
        eps = checks.number("rms_norm", "eps", eps)
    if type(weight_offset) is not float:
        weight_offset = checks.number("rms_norm", "weight_offset", weight_offset)

    def why_not(backend: str) -> str | None:
        return "its kernel takes a residual in the dtype of x" if backend == "cuda" else None

    two_dtypes = residual is not None and residual.dtype != x.dtype
    chosen = backends.select("rms_norm", x, backend, why_not if two_dtypes else None)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return reference.rms_norm(x, weight, eps=eps, residual=residual, weight_offset=weight_offset)
    wanted = differentiated(x, weight, residual)
    run = _rms_norm if wanted else rms_norm_forward
    y, h, _ = run(x, weight, residual, eps, weight_offset, wanted, chosen)
    return y if residual is None else (y, h)


class _RMSNorm(torch.autograd.Function):
    """``(y, h, rstd)``, as rms_norm_forward."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        weight_offset: float,
        differentiated: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return rms_norm_forward(x, weight, residual, eps, weight_offset, differentiated, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, residual, _, ctx.weight_offset, _, ctx.backend = inputs
        ctx.dtype = x.dtype
        _, h, rstd = output
        ctx.has_residual = residual is not None
        ctx.save_for_backward(h if ctx.has_residual else x, weight, rstd)
        ctx.mark_non_differentiable(*(t for t in ((rstd,) if ctx.has_residual else (h, rstd)) if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = dh, None
        if dy is not None:
            wanted = ctx.needs_input_grad[1]
            dx, dweight = rms_norm_backward(dy, x, weight, rstd, dh, ctx.weight_offset, wanted, ctx.backend)
            dx = differentiable_once("rms_norm", x, dx)
            dweight = differentiable_once("rms_norm", x, dweight) if wanted else None
        dresidual = dx if ctx.has_residual else None
        return None if dx is None else dx.to(ctx.dtype), dweight, dresidual, None, None, None, None


_rms_norm = function(_RMSNorm)


@operator(strided="x residual")
def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    differentiated: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y``; ``h``, x + residual; ``rstd``, float32, one per row, which the backward needs."""
    h = None if residual is None else empty_like(residual)
    rstd = None
    if differentiated:
        rstd = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    return empty_like(x), h, rstd


@operator(strided="dy x dh")
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    weight_offset: float,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``dx`` and ``dweight``; ``x`` is what was normalised."""
    return empty_like(x), None if weight is None or not need_dweight else empty_like(weight)
