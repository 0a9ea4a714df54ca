"""``softmax``, ``cross_entropy``, ``linear_cross_entropy`` and ``linear_log_prob``: the public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from . import reference


@backends.op()
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
        x: ``[..., n]``, float32, float16 or bfloat16 (with ``causal``: ``[..., rows, n]``).
        scale: multiplies x first.
        causal: row i sees the columns up to ``i + n - rows`` (bottom-right aligned).
        mask: broadcast to x; boolean (True is seen) or of a floating dtype (added to ``x · scale``).
        backend: see ``explain``.

    Returns:
        The probabilities, in the shape and dtype of x.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device.
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
    backends.select("softmax", x, backend)
    return reference.softmax(x, scale=scale, causal=causal, mask=mask)


@backends.op()
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits against target classes, as ``torch.nn.functional.cross_entropy`` and more.

    Args:
        logits: ``[..., classes]``, float32, float16 or bfloat16. Computed in float32.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``.
        weight: ``[classes]``, a weight for each class.
        ignore_index: targets that count nothing. Where all do, the mean is 0 with zero gradients.
        label_smoothing: the share of the target spread evenly over the classes.
        z_loss: z adds ``z · logsumexp²`` to each token's loss (Chowdhery et al. 2022, arXiv:2204.02311).
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)``.
        reduction: ``"mean"`` (over the valid targets' weights), ``"sum"`` or ``"none"``.
        return_lse: also return the log-sum-exp of each row.
        inplace_backward: allow the backward to write the gradient over the logits; the torch backend never does.
        backend: see ``explain``.

    Returns:
        The loss, float32: a scalar, or ``[...]`` with reduction "none"; with return_lse ``(loss, lse)``.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape, device or reduction.
    """
    checks.floating("cross_entropy", "logits", logits)
    _check_target("cross_entropy", "logits", logits, target)
    _check_loss("cross_entropy", "logits", logits, logits.shape[-1], weight, label_smoothing, reduction)
    backends.select("cross_entropy", logits, backend)
    return _loss(
        logits, target, return_lse, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, softcap=softcap, reduction=reduction,
    )  # fmt: skip


@backends.op()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(hidden @ weightᵀ + bias, target)``: a language model's head and its loss in one.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it.
        target: ``[...]`` int64 or int32.
        bias: ``[classes]`` or None.
        class_weight: ``[classes]``, cross_entropy's ``weight``.

    The other arguments, the results and the errors are those of :func:`cross_entropy`.
    """
    _check_linear("linear_cross_entropy", hidden, weight, target, bias)
    _check_loss(
        "linear_cross_entropy", "hidden", hidden, weight.shape[0], class_weight, label_smoothing, reduction,
        "class_weight",
    )  # fmt: skip
    backends.select("linear_cross_entropy", hidden, backend)
    return _loss(
        _logits(hidden, weight, bias), target, return_lse, weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
    )  # fmt: skip


@backends.op()
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``log_softmax(hidden @ weightᵀ + bias)`` at the target: the log-probability of each token.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it.
        target: ``[...]`` int64 or int32, in ``[0, classes)``.
        bias: ``[classes]`` or None.
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)``.
        backend: see ``explain``.

    Returns:
        ``[...]`` float32.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device.
    """
    _check_linear("linear_log_prob", hidden, weight, target, bias)
    backends.select("linear_log_prob", hidden, backend)
    return reference.log_prob(_logits(hidden, weight, bias), target, softcap=softcap)


def _loss(
    logits: Tensor,
    target: Tensor,
    return_lse: bool,
    *,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The torch backend: PyTorch's own cross_entropy for what that can express, else the specification."""
    if return_lse or z_loss or softcap:
        loss, lse = reference.cross_entropy(
            logits, target, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, reduction=reduction,
        )  # fmt: skip
        return (loss, lse) if return_lse else loss
    wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if weight is None else weight.to(wide.dtype)
    index = target.reshape(-1).long()
    summed = F.cross_entropy(
        wide, index, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction="none" if reduction == "none" else "sum",
    )  # fmt: skip
    if reduction == "none":
        return summed.view(target.shape)
    if reduction == "sum":
        return summed
    return summed / reference.normaliser(index, weight, ignore_index, wide.dtype)


def _check_target(op: str, name: str, x: Tensor, target: Tensor) -> None:
    checks.indices(op, "target", target, name, x)
    checks.sized(op, "target", target, tuple(x.shape[:-1]))


def _check_loss(
    op: str,
    name: str,
    x: Tensor,
    classes: int,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    weight_name: str = "weight",
) -> None:
    if classes == 0:
        raise ValueError(f"{op}: there are no classes; the last dimension must have at least one")
    if weight is not None:
        checks.parameter(op, weight_name, weight, name, x, (classes,))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, not {label_smoothing}")


def _check_linear(op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    checks.floating(op, "hidden", hidden)
    checks.tensor(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [classes, features], it has shape {list(weight.shape)}")
    checks.parameter(op, "weight", weight, "hidden", hidden, (weight.shape[0], hidden.shape[-1]))
    _check_target(op, "hidden", hidden, target)
    if bias is not None:
        checks.parameter(op, "bias", bias, "hidden", hidden, (weight.shape[0],))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
