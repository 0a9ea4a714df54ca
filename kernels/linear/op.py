"""``packed_linear``: the public function and its operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from ..library import operator
from . import reference
from .packed import PackedWeight, Stored


@backends.op("triton", "cpu")
def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x weightᵀ + bias`` for inference, sums in float32, without gradients. With a gated weight
    ``silu(x gateᵀ) · (x weightᵀ)``, rounded once.

    By a kernel, a row of the result depends on that row of x alone, bit by bit: neither on the other rows nor on their
    number nor on the number of threads. PyTorch's linear promises no such thing, and so ``backend="torch"`` doesn't.

    Args:
        x: ``[..., in_features]`` in the dtype that the weight had, any strides.
        weight: what :func:`pack_weight` made, on the device of x.
        bias: ``[out_features]`` in the dtype of x, or None; a gated weight takes none.
        out_dtype: of the result: None, that of x, or torch.float32, in which the sums are.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        ``[..., out_features]`` in out_dtype, contiguous.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, a tensor that needs
            a gradient, or a ``backend`` that can't run this call.
    """
    checks.floating("packed_linear", "x", x)
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"packed_linear: weight must be what pack_weight makes, not {type(weight).__name__}")
    if x.dtype != weight.dtype:
        raise TypeError(
            f"packed_linear: x is {checks.short(x.dtype)} but the weight was {checks.short(weight.dtype)} when it was "
            "packed; cast x, or pack the weight in its dtype"
        )
    checks.on("packed_linear", "weight", weight.data, "x", x)
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"packed_linear: x must have in_features = {weight.in_features} columns, it has shape {list(x.shape)}"
        )
    if bias is not None and weight.gated:
        raise ValueError("packed_linear: a gated weight takes no bias")
    if bias is not None:
        checks.like("packed_linear", "bias", bias, "x", x, shape=(weight.out_features,))
    if out_dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"packed_linear: out_dtype must be {checks.short(x.dtype)} or float32, not {out_dtype}")
    wide = out_dtype == torch.float32
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "packed_linear: it has no gradient, and an argument requires one; call it under torch.no_grad(), or "
            "torch.nn.functional.linear, which has"
        )
    limit = None if weight.panels else "the weight was packed where there was no CPU kernel"
    chosen = backends.select("packed_linear", x, backend, lambda b: limit if b == "cpu" else None)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return reference.packed_linear(x, weight.matrix(), weight.scales, bias, weight.gated, out_dtype or x.dtype)
    stored = Stored(weight.data, weight.scales, weight.out_features, weight.panels, weight.gated)
    if stored.panels != (chosen == "cpu"):
        stored = stored._replace(data=weight.matrix(), panels=False)
    return packed_linear_forward(x, stored, bias, wide, chosen)


@operator(strided="x")
def packed_linear_forward(x: Tensor, weight: Stored, bias: Tensor | None, wide: bool, backend: str) -> Tensor:
    """``wide``: the result is float32."""
    dtype = torch.float32 if wide else x.dtype
    return torch.empty(*x.shape[:-1], weight.out_features, dtype=dtype, device=x.device)
