"""``linear_cross_entropy`` and ``linear_log_prob``: a language model's head and its loss, chunk by chunk.

Three matrix products dominate: logits, and the gradients of hidden and weight. Where the gradient of the loss
is known beforehand up to one factor (reduction "mean" or "sum"), it is computed with the loss, chunk by chunk,
and the logits never again (as Liger kernel does, Hsu et al. 2024, arXiv:2410.10989). Elsewhere the backward
computes each chunk of logits a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, function, operator
from . import reference, sharded
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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        loss, lse = _per_token(hidden, weight, bias, targets, options, accumulate_float32, False, None, chosen)
        loss = reduce(loss, lse, z, targets, options, reduction)
        loss = loss.view(target.shape) if reduction == "none" else loss
        return (loss, lse.view(target.shape)) if return_lse else loss
    wanted = Wanted.of(hidden, weight, bias, accumulate_float32)
    factor = torch.ones((), dtype=torch.float32, device=hidden.device)
    if reduction == "mean":
        factor = factor / reference.normaliser(targets.target, targets.class_weight, ignore_index, torch.float32)
    return _reduced(hidden, weight, bias, targets, factor, options, wanted, chosen)[0]


# fmt: off
@overload
def linear_log_prob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    softcap: float = 0.0, temperature: float = 1.0, return_entropy: Literal[False] = False,
    group: ProcessGroup | None = None, backend: str | None = None,
) -> Tensor: ...
@overload
def linear_log_prob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    softcap: float = 0.0, temperature: float = 1.0, return_entropy: Literal[True],
    group: ProcessGroup | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_log_prob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    softcap: float = 0.0, temperature: float = 1.0, return_entropy: bool = False,
    group: ProcessGroup | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@backends.op("cuda", "triton", "cpu")
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
    return_entropy: bool = False,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax((hidden @ weightᵀ + bias) / temperature)`` at the target: the log-probability of each token.

    For preference losses, reinforcement learning and evaluation. The logits are never held whole: the memory is that
    of :func:`linear_cross_entropy`, and the backward computes each chunk of logits again.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16. Under autocast it is cast as for a linear layer.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it. Under autocast
            any dtype.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``.
        bias: ``[classes]`` or None, in the dtype of hidden or float32.
        ignore_index: tokens with this target give 0, without a gradient.
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)``, before the division by the temperature.
        temperature: above 0. That of sampling: 1 leaves the distribution as it is, less sharpens it.
        return_entropy: also return the entropy of each token's distribution, in nats, which may be differentiated
            too: with scores s and p = softmax(s), ``H = -Σ pⱼ·log pⱼ`` and ``∂H/∂sⱼ = -pⱼ·(log pⱼ + H)``.
        group: weight and bias are this process's share of the classes, all shares equally large and in the order of
            the group's ranks; hidden and target (a class of all) are the same everywhere. The result is that of
            the whole head: one exchange of three numbers a token (four with the entropy). The backward adds up
            the gradient of hidden over the group, in its dtype; that of weight is this process's own. A weight that is
            a DTensor sharded over its first dimension (evenly or not) needs no group. The torch backend gathers the
            weight.
        backend: see ``explain``.

    Returns:
        ``[...]`` float32; with return_entropy ``(log_prob, entropy)``, both so.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape, device or temperature, a DTensor
            sharded otherwise, or targets that differ within the group (on a GPU: NaN, as :func:`cross_entropy` has it
            for a target out of range). IndexError: a target out of range.
    """
    op = "linear_log_prob"
    shard = sharded.shard_of(op, "weight", weight, 0, group)
    bias = None if bias is None else sharded.shard_of(op, "bias", bias, 0, group).part
    hidden, weight, bias = _linear(op, hidden, shard.part, target, bias)
    check_classes(op, shard.classes)
    options = check_options(op, ignore_index, 0.0, 0.0, softcap, shard.first_class, shard.classes, temperature)
    chosen = backends.select(op, hidden, backend)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        check_range(op, target, options)
        if shard.group is not None:
            weight = sharded.gathered(shard._replace(part=weight), 0)
            bias = None if bias is None else sharded.gathered(shard._replace(part=bias), 0)
        logits = _logits(hidden, weight, bias)
        if shard.group is not None:
            logits = logits.masked_fill(sharded.apart(target, shard.group).unsqueeze(-1), torch.nan)
        given: dict[str, Any] = {"softcap": options.softcap, "temperature": float(temperature)}
        given["ignore_index"] = options.ignore_index
        log_prob = reference.log_prob(logits, target, **given)
        return (log_prob, reference.entropy(logits, target, **given)) if return_entropy else log_prob
    targets = Targets.of(target, None, 0.0)
    loss, _, *entropy = _per_token(
        hidden, weight, bias, targets, options, False, bool(return_entropy), shard.group, chosen
    )
    log_prob = -loss.view(target.shape)
    return (log_prob, entropy[0].view(target.shape)) if return_entropy else log_prob


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
            loss, *_ = linear_cross_entropy_forward(linear, targets, options, False, backend)
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
    """(loss, lse) of each token, or (loss, lse, entropy); the backward computes the logits again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        options: Options,
        accumulate_float32: bool,
        with_entropy: bool,
        group: ProcessGroup | None,
        backend: str,
    ) -> tuple[Tensor, ...]:
        linear = Linear(hidden, weight, bias)
        loss, lse, entropy = linear_cross_entropy_forward(linear, targets, options, with_entropy, backend)
        if group is not None:
            entropy = entropy if with_entropy else None  # torch.compile has it empty
            return sharded.combine_head(loss, lse, entropy, targets.target, options, group)
        return (loss, lse, entropy) if with_entropy else (loss, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, targets, ctx.options, ctx.accumulate_float32, _, ctx.group, ctx.backend = inputs
        ctx.save_for_backward(hidden, weight, bias, *targets, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dloss is None and dlse is None and dentropy is None:
            return (None,) * 9
        hidden, weight, bias, *targets, lse = ctx.saved_tensors[:7]
        linear, needed = Linear(hidden, weight, bias), ctx.needs_input_grad[:3]
        upstream = Upstream(dloss, dlse)
        if dentropy is not None:
            upstream = Upstream(dloss, dlse, dentropy, ctx.saved_tensors[7])
        wanted = Wanted._make((*needed, ctx.accumulate_float32))
        dhidden, *grads = linear_cross_entropy_backward(
            linear, Targets(*targets), lse, upstream, wanted, ctx.options, ctx.backend
        )
        if ctx.group is not None and needed[0]:
            dhidden = sharded.summed(dhidden, ctx.group)
        grads = [
            differentiable_once("linear_cross_entropy", hidden, g) if need else None
            for g, need in zip((dhidden, *grads), needed, strict=True)
        ]
        return *grads, *(None,) * 6


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
    linear: Linear,
    targets: Targets,
    options: Options,
    with_entropy: bool,
    backend: str,
    loss: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
) -> None:
    run_chunks(linear, targets, options, backend, loss=loss, lse=lse, entropy=entropy)


@operator(strided="hidden weight bias", launch=_launch_forward)
def linear_cross_entropy_forward(
    linear: Linear, targets: Targets, options: Options, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the log-sum-exp and, where wanted, the entropy of each token; of a share of the classes, its share of
    each (csrc/cross_entropy.h)."""
    entropy = _of_each_token(targets) if with_entropy else None
    return _of_each_token(targets), _of_each_token(targets), entropy


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
