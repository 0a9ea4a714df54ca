"""``cross_entropy``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, register
from . import reference, sharded
from .launchers import launchers
from .options import SCHEMA, Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@backends.op("cuda", "triton", "cpu")
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
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits against target classes, as ``torch.nn.functional.cross_entropy`` and more.

    Args:
        logits: ``[..., classes]``, float32, float16 or bfloat16, any strides. Computed in float32.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``.
        weight: ``[classes]``, a weight for each class.
        ignore_index: targets that count nothing. Where all do, the mean is 0 with zero gradients.
        label_smoothing: the share of the target spread evenly over the classes.
        z_loss: z adds ``z · logsumexp²`` to each token's loss (Chowdhery et al. 2022, arXiv:2204.02311).
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)`` (Gemma 2, arXiv:2408.00118).
        reduction: ``"mean"`` (over the valid targets' weights), ``"sum"`` or ``"none"``.
        return_lse: also return the log-sum-exp of each row, which may be differentiated too.
        inplace_backward: write the gradient over contiguous logits, which saves their memory once more.
            Their content is lost; autograd raises where it would still have needed it. Without effect in
            torch.compile (which plans memory by itself) and on the torch backend.
        group: the logits are this process's share of the classes, all shares equally large and in the order
            of the group's ranks; target and weight are the same everywhere. The result is that of the whole
            logits. One exchange of two numbers a token. A DTensor sharded over its last dimension (evenly or
            not) needs no group.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        The loss, float32: a scalar, or ``[...]`` with reduction "none"; with return_lse ``(loss, lse)``.

    The logits are read once forward; the backward reads them once and writes their gradient. A target out of
    range raises IndexError on a CPU. On a GPU it makes the loss NaN, unless the environment variable
    FASTLLM_DEBUG=1 asks for the check, which waits for the GPU.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape, device or reduction, or
            a ``backend`` that can't run this call. IndexError: a target out of range.
    """
    shard = sharded.shard_of(logits, group)
    logits = shard.logits
    checks.floating("cross_entropy", "logits", logits)
    check_target("cross_entropy", "logits", logits, target)
    check_loss("cross_entropy", "logits", logits, shard.classes, weight, label_smoothing, reduction)
    chosen = backends.select("cross_entropy", logits, backend)
    if isinstance(chosen, backends.Explanation):
        return chosen
    if chosen == "torch":
        return torch_loss(
            logits if shard.group is None else sharded.gathered(shard), target, return_lse, weight=weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            reduction=reduction,
        )  # fmt: skip
    options = Options(
        ignore_index, float(label_smoothing), float(z_loss), float(softcap), shard.first_class, shard.classes
    )
    weight, mean_weight = class_weights(weight)
    index = target.reshape(-1).long()
    loss, lse = _CrossEntropy.apply(
        logits, index, weight, mean_weight, options, shard.group, inplace_backward, return_lse, chosen
    )
    loss = reduce(loss.view(target.shape), target, weight, ignore_index, reduction)
    return (loss, lse.view(target.shape)) if return_lse else loss


class _CrossEntropy(torch.autograd.Function):
    """(loss, lse) of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        mean_weight: Tensor | None,
        options: Options,
        group: ProcessGroup | None,
        inplace_backward: bool,
        return_lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        loss, lse = torch.ops.fastllm.cross_entropy_forward(
            logits, target, class_weight, mean_weight, *options, backend
        )
        if group is not None:
            loss, lse = sharded.combine(loss, lse, target, class_weight, mean_weight, options, group)
        ctx.save_for_backward(logits, target, class_weight, mean_weight, lse)
        ctx.options, ctx.backend, ctx.inplace = options, backend, inplace_backward
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, class_weight, mean_weight, lse = ctx.saved_tensors
        if dloss is None and dlse is None:
            return (None,) * 9
        tensors = (logits, target, class_weight, mean_weight, lse, dloss, dlse)
        if ctx.inplace and logits.is_contiguous() and not torch.compiler.is_compiling():
            torch.ops.fastllm.cross_entropy_backward_(*tensors, *ctx.options, ctx.backend)
            torch.autograd.graph.increment_version(logits)
            dlogits = logits.detach()
        else:
            dlogits = torch.ops.fastllm.cross_entropy_backward(*tensors, *ctx.options, ctx.backend)
        return differentiable_once("cross_entropy", logits, dlogits), *(None,) * 8


@register(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? mean_weight,"
    f" {SCHEMA}, str backend) -> (Tensor loss, Tensor lse)",
    fake=lambda logits, target, *_: tuple(logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2)),
)
def _forward(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, mean_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``target`` ``[rows]`` int64; ``class_weight`` ``[classes]`` and its mean float32, both or none."""
    *options, backend = rest
    options = Options(*options)
    check_range("cross_entropy", target, options)
    loss, lse = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    if target.numel():
        launchers(backend).cross_entropy_forward(logits, target, class_weight, mean_weight, loss, lse, options, backend)
    return loss, lse


_BACKWARD = (
    "Tensor target, Tensor? class_weight, Tensor? mean_weight, Tensor lse, Tensor? dloss, Tensor? dlse,"
    f" {SCHEMA}, str backend"
)


@register(
    f"cross_entropy_backward(Tensor logits, {_BACKWARD}) -> Tensor",
    fake=lambda logits, *_: logits.new_empty(logits.shape),
)
def _backward(logits: Tensor, *rest: Any) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    launch_backward(logits, dlogits, *rest)
    return dlogits


@register(f"cross_entropy_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()", fake=lambda *_: None)
def _backward_(logits: Tensor, *rest: Any) -> None:
    launch_backward(logits, logits, *rest)


def launch_backward(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    mean_weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlse: Tensor | None,
    *rest: Any,
) -> None:
    """``dlogits`` is contiguous, and may be ``logits``; ``dloss`` may have stride 0: one value for all rows."""
    *options, backend = rest
    if target.numel():
        dlse = None if dlse is None else dlse.contiguous()
        launchers(backend).cross_entropy_backward(
            logits, target, class_weight, mean_weight, lse, dloss, dlse, dlogits, Options(*options), backend
        )


# ---- what the losses share ----


def class_weights(weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The weights as the kernels take them, float32, and their mean."""
    if weight is None:
        return None, None
    weight = weight.float().contiguous()
    return weight, weight.mean()


def reduce(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total / reference.normaliser(target, weight, ignore_index, loss.dtype) if reduction == "mean" else total


def torch_loss(
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
    loss = F.cross_entropy(
        wide, index, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    return reduce(loss.view(target.shape), target, weight, ignore_index, reduction)


def check_range(op: str, target: Tensor, options: Options) -> None:
    """Raise where a target is no class: always on a CPU; on a GPU, which must be waited for, when debugging."""
    if target.device.type == "cpu" or checks.DEBUG:
        out = (target != options.ignore_index) & ((target < 0) | (target >= options.classes))
        if out.any():
            raise IndexError(
                f"{op}: target holds {target[out][0].item()}, which is neither in [0, {options.classes}) "
                f"nor the ignore_index {options.ignore_index}"
            )


def check_target(op: str, name: str, x: Tensor, target: Tensor) -> None:
    checks.indices(op, "target", target, name, x)
    checks.sized(op, "target", target, tuple(x.shape[:-1]))


def check_loss(
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
        if weight.requires_grad:
            raise ValueError(f"{op}: {weight_name} gets no gradient; pass {weight_name}.detach()")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, not {label_smoothing}")
