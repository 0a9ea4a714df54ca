"""``linear_cross_entropy`` and ``linear_log_prob``: a language model's head and its loss, chunk by chunk.

Three matrix products dominate: logits, and the gradients of hidden and weight. Where the gradient of the loss
is known beforehand up to one factor (reduction "mean" or "sum"), it is computed with the loss, chunk by chunk,
and the logits never again (as Liger kernel does, Hsu et al. 2024, arXiv:2410.10989). Elsewhere the backward
computes each chunk of logits a second time.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, function, operator
from . import reference
from .cross_entropy_op import (
    PROBABILITIES,
    check_class_weight,
    check_classes,
    check_options,
    check_range,
    check_reduction,
    check_target,
    reduce,
    torch_loss,
    z_apart,
)
from .linear_chunks import Linear, Wanted, run_chunks
from .options import Options, Targets, Upstream


# fmt: off
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0, reduction: str = "mean", return_lse: Literal[False] = False,
    accumulate_float32: bool = False, backend: str | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0, reduction: str = "mean", return_lse: Literal[True], accumulate_float32: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0, reduction: str = "mean", return_lse: bool = False, accumulate_float32: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@backends.op("cuda", "triton", "cpu")
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
    accumulate_float32: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(hidden @ weightᵀ + bias, target)`` without ever holding all the logits.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16. Under autocast it is cast as for a linear layer.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it. Under autocast
            any dtype.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``; or the probabilities of the
            classes, ``[..., classes]``, for which PyTorch runs, and holds all the logits.
        bias: ``[classes]`` or None, in the dtype of hidden or float32.
        class_weight: ``[classes]``, cross_entropy's ``weight``.
        accumulate_float32: add up the chunks' gradients of weight in float32, which takes
            ``4 · classes · features`` bytes while it lasts; else in the dtype of hidden. The gradient of bias is
            always added up in float32, and that of hidden is one product, which takes no adding up.

    The other arguments, the results and the errors are those of :func:`cross_entropy`.

    Memory: beyond the gradients, one chunk of logits, ``chunk · classes`` elements in the dtype of hidden, where
    ``chunk`` is a fifth of the tokens, but at least 256 and at most 2048 (``linear_chunks.chunk_size``); on CPUs that
    multiply no matrices in that dtype, a float32 chunk and a float32 copy of weight. With reduction "mean" or "sum",
    no return_lse, and a dtype other than float16, the forward computes the gradients of hidden and weight too and
    holds them for the backward, which only scales them, in new memory. Otherwise the backward computes the logits
    again: one more matrix product, and nothing held.

    A DTensor (an FSDP2 parameter outside its module's forward) raises: see the message.
    """
    hidden, weight, bias = _linear("linear_cross_entropy", hidden, weight, target, bias, probabilities=True)
    check_classes("linear_cross_entropy", weight.shape[0])
    check_class_weight("linear_cross_entropy", "class_weight", class_weight, "hidden", hidden, weight.shape[0])
    check_reduction("linear_cross_entropy", reduction)
    options = check_options("linear_cross_entropy", ignore_index, label_smoothing, z_loss, softcap, 0, weight.shape[0])
    soft = target.is_floating_point()
    chosen = backends.select("linear_cross_entropy", hidden, backend, lambda _: PROBABILITIES if soft else None)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return torch_loss(
            "linear_cross_entropy", _logits(hidden, weight, bias), target, class_weight, options, reduction, return_lse
        )
    targets, options, z = Targets.of(target, class_weight, label_smoothing), *z_apart(options, class_weight, reduction)
    # float16 gradients without the caller's loss scale would underflow: it must be known first
    if reduction == "none" or return_lse or z or hidden.dtype == torch.float16:
        loss, lse = _per_token(hidden, weight, bias, targets, options, accumulate_float32, chosen)
        loss = reduce(loss, lse, z, targets, options, reduction)
        loss = loss.view(target.shape) if reduction == "none" else loss
        return (loss, lse.view(target.shape)) if return_lse else loss
    wanted = Wanted.of(hidden, weight, bias, accumulate_float32)
    factor = torch.ones((), dtype=torch.float32, device=hidden.device)
    if reduction == "mean":
        factor = factor / reference.normaliser(targets.target, targets.class_weight, ignore_index, torch.float32)
    return _reduced(hidden, weight, bias, targets, factor, options, wanted, chosen)[0]


@backends.op("cuda", "triton", "cpu")
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``log_softmax(hidden @ weightᵀ + bias)`` at the target: the log-probability of each token.

    For preference losses and evaluation. The logits are never held whole: the memory is that of
    :func:`linear_cross_entropy`, and the backward computes each chunk of logits again.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16. Under autocast it is cast as for a linear layer.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it. Under autocast
            any dtype.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``.
        bias: ``[classes]`` or None, in the dtype of hidden or float32.
        ignore_index: tokens with this target give 0, without a gradient.
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)``.
        backend: see ``explain``.

    Returns:
        ``[...]`` float32.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device. IndexError: a
            target out of range (on a GPU: NaN, see :func:`cross_entropy`).
    """
    hidden, weight, bias = _linear("linear_log_prob", hidden, weight, target, bias)
    check_classes("linear_log_prob", weight.shape[0])
    options = check_options("linear_log_prob", ignore_index, 0.0, 0.0, softcap, 0, weight.shape[0])
    chosen = backends.select("linear_log_prob", hidden, backend)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        check_range("linear_log_prob", target, options)
        return reference.log_prob(
            _logits(hidden, weight, bias), target, softcap=options.softcap, ignore_index=options.ignore_index
        )
    loss, _ = _per_token(hidden, weight, bias, Targets.of(target, None, 0.0), options, False, chosen)
    return -loss.view(target.shape)


class _Reduced(torch.autograd.Function):
    """``factor`` times the sum of the losses, and their gradients, which are computed with them."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        factor: Tensor,
        options: Options,
        wanted: Wanted,
        backend: str,
    ) -> tuple[Tensor, ...]:
        linear, grads = Linear(hidden, weight, bias), ()
        if any(wanted[:3]):
            loss, *grads = linear_cross_entropy_with_gradients(linear, targets, factor, wanted, options, backend)
        else:
            loss, _ = linear_cross_entropy_forward(linear, targets, options, backend)
        return loss.sum() * factor, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (hidden, *_, wanted, _), (_, *grads) = inputs, output
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        if grads:
            ctx.save_for_backward(hidden, *(g if need else None for g, need in zip(grads, wanted, strict=False)))

    @staticmethod
    def backward(ctx: Any, by: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if by is None:
            return (None,) * 8
        hidden, *grads = ctx.saved_tensors
        grads = [None if g is None else differentiable_once("linear_cross_entropy", hidden, g * by) for g in grads]
        return *grads, *(None,) * 5


class _PerToken(torch.autograd.Function):
    """(loss, lse) of each token; the backward computes the logits again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        options: Options,
        accumulate_float32: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_forward(Linear(hidden, weight, bias), targets, options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, targets, ctx.options, ctx.accumulate_float32, ctx.backend = inputs
        ctx.save_for_backward(hidden, weight, bias, *targets, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None and dlse is None:
            return (None,) * 7
        *saved, lse = ctx.saved_tensors
        linear, targets, needed = Linear(*saved[:3]), Targets(*saved[3:]), ctx.needs_input_grad[:3]
        wanted = Wanted._make((*needed, ctx.accumulate_float32))
        grads = linear_cross_entropy_backward(
            linear, targets, lse, Upstream(dloss, dlse), wanted, ctx.options, ctx.backend
        )
        grads = [
            differentiable_once("linear_cross_entropy", linear.hidden, g) if need else None
            for g, need in zip(grads, needed, strict=True)
        ]
        return *grads, *(None,) * 4


_reduced, _per_token = function(_Reduced), function(_PerToken)


# ---- operators ----


def _of_each_token(targets: Targets) -> Tensor:
    return targets.target.new_empty(targets.target.shape, dtype=torch.float32)


def _gradients(linear: Linear, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; empty where none is wanted."""
    dhidden, dweight, dbias = (
        linear.hidden.new_empty(0) if t is None else t.new_empty(t.shape if need else (0,))
        for t, need in zip(linear, wanted[:3], strict=True)
    )
    return dhidden, dweight, dbias


def _launch_forward(
    linear: Linear, targets: Targets, options: Options, backend: str, loss: Tensor, lse: Tensor
) -> None:
    run_chunks(linear, targets, options, backend, loss=loss, lse=lse)


@operator(strided="hidden weight bias", launch=_launch_forward)
def linear_cross_entropy_forward(
    linear: Linear, targets: Targets, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exp of each token."""
    return _of_each_token(targets), _of_each_token(targets)


def _launch_with_gradients(
    linear: Linear,
    targets: Targets,
    factor: Tensor,
    wanted: Wanted,
    options: Options,
    backend: str,
    loss: Tensor,
    *grads: Tensor,
) -> None:
    upstream = Upstream(factor.expand(loss.shape), None)
    run_chunks(
        linear, targets, options, backend, loss=loss, lse=torch.empty_like(loss), upstream=upstream, grads=grads,
        accumulate_float32=wanted.accumulate_float32,
    )  # fmt: skip


@operator(strided="hidden weight bias", launch=_launch_with_gradients)
def linear_cross_entropy_with_gradients(
    linear: Linear, targets: Targets, factor: Tensor, wanted: Wanted, options: Options, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each token, and the gradients of ``factor`` times their sum."""
    return _of_each_token(targets), *_gradients(linear, wanted)


def _launch_backward(
    linear: Linear,
    targets: Targets,
    lse: Tensor,
    upstream: Upstream,
    wanted: Wanted,
    options: Options,
    backend: str,
    *grads: Tensor,
) -> None:
    run_chunks(
        linear, targets, options, backend, lse=lse, upstream=upstream, grads=grads,
        accumulate_float32=wanted.accumulate_float32,
    )  # fmt: skip


@operator(strided="hidden weight bias dloss", launch=_launch_backward)
def linear_cross_entropy_backward(
    linear: Linear,
    targets: Targets,
    lse: Tensor,
    upstream: Upstream,
    wanted: Wanted,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(linear, wanted)


# ---- arguments ----


def _linear(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, probabilities: bool = False
) -> Linear:
    """The layer, checked, and cast as ``F.linear`` casts it under autocast; float32 parameters are rounded later,
    where they are read."""
    checks.floating(op, "hidden", hidden)
    checks.tensor(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [classes, features], it has shape {list(weight.shape)}")
    check_target(op, "hidden", hidden, target, weight.shape[0] if probabilities else None)
    (hidden,) = checks.autocast(hidden)
    classes, features = weight.shape[0], hidden.shape[-1]
    return Linear(
        hidden,
        _parameter(op, "weight", weight, hidden, (classes, features)),
        None if bias is None else _parameter(op, "bias", bias, hidden, (classes,)),
    )


def _parameter(
    op: str, name: str, x: Tensor, hidden: Tensor, shape: tuple[int, ...], hidden_name: str = "hidden"
) -> Tensor:
    checks.on(op, name, x, hidden_name, hidden)
    checks.sized(op, name, x, shape)
    if x.dtype not in (hidden.dtype, torch.float32):
        (x,) = checks.autocast(x)
    if x.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name} is {checks.short(x.dtype)} but {hidden_name} is {checks.short(hidden.dtype)}; cast one to "
            "the other's dtype, or call it under torch.autocast, which casts both, but for float64"
        )
    return x


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
