"""``cross_entropy``: the public function, its autograd Function and its operators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, empty_like, function, has_values, launchers, operator
from . import reference, sharded
from .options import Options, Targets, Upstream

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# fmt: off
@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
    return_lse: Literal[False] = False, inplace_backward: bool = False, group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
    return_lse: Literal[True], inplace_backward: bool = False, group: ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
    return_lse: bool = False, inplace_backward: bool = False, group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
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
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``; or the probabilities of the
            classes, floating, in the shape of logits, for which PyTorch runs.
        weight: ``[classes]``, a weight for each class.
        ignore_index: targets that count nothing. Where all do, the mean is 0 with zero gradients.
        label_smoothing: the share of the target spread evenly over the classes.
        z_loss: z adds ``z · logsumexp²`` to each token's loss (Chowdhery et al. 2022, arXiv:2204.02311). Class
            weights don't weigh it: a mean divides it by the number of valid targets.
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)`` (Gemma 2, arXiv:2408.00118).
        reduction: ``"mean"`` (over the valid targets' weights), ``"sum"`` or ``"none"``.
        return_lse: also return the log-sum-exp of each row, which may be differentiated too.
        inplace_backward: write the gradient over contiguous logits, which saves their memory once more.
            Their content is lost; autograd raises where it would still have needed it. Without effect on a leaf,
            in torch.compile (which plans memory by itself) and on the torch backend.
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
    shard = sharded.shard_of("cross_entropy", "logits", logits, -1, group)
    logits = shard.part
    checks.floating("cross_entropy", "logits", logits)
    check_target("cross_entropy", "logits", logits, target, shard.classes)
    check_classes("cross_entropy", shard.classes)
    check_class_weight("cross_entropy", "weight", weight, "logits", logits, shard.classes)
    check_reduction("cross_entropy", reduction)
    options = check_options(
        "cross_entropy", ignore_index, label_smoothing, z_loss, softcap, shard.first_class, shard.classes
    )
    soft = target.is_floating_point()
    if soft and shard.group is not None:
        raise ValueError("cross_entropy: target holds probabilities, which logits spread over a group don't take")
    chosen = backends.select("cross_entropy", logits, backend, lambda _: PROBABILITIES if soft else None)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        whole = logits if shard.group is None else sharded.gathered(shard, -1)
        return torch_loss("cross_entropy", whole, target, weight, options, reduction, return_lse)
    targets, options, z = Targets.of(target, weight, label_smoothing), *z_apart(options, weight, reduction)
    with_lse = return_lse or z != 0
    base = logits if logits._base is None else logits._base
    inplace_backward = inplace_backward and not (base.is_leaf and base.requires_grad) and not logits.is_leaf
    loss, lse = _cross_entropy(logits, targets, options, shard.group, inplace_backward, with_lse, chosen)
    loss = reduce(loss, lse, z, targets, options, reduction)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse.view(target.shape)) if return_lse else loss


class _CrossEntropy(torch.autograd.Function):
    """(loss, lse) of each row."""

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Targets,
        options: Options,
        group: ProcessGroup | None,
        inplace_backward: bool,
        return_lse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        loss, lse = cross_entropy_forward(logits, targets, options, backend)
        if group is not None:
            loss, lse = sharded.combine(loss, lse, targets, options, group)
        return loss, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, targets, ctx.options, _, ctx.inplace, return_lse, ctx.backend = inputs
        _, lse = output
        ctx.save_for_backward(logits, lse, *targets)
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None and dlse is None:
            return (None,) * 7
        logits, lse, *targets = ctx.saved_tensors
        arguments = (logits, Targets(*targets), lse, Upstream(dloss, dlse), ctx.options, ctx.backend)
        if ctx.inplace and logits.is_contiguous() and has_values():
            cross_entropy_backward_(*arguments)
            dlogits = logits.detach()
        else:
            dlogits = cross_entropy_backward(*arguments)
        return differentiable_once("cross_entropy", logits, dlogits), *(None,) * 6


_cross_entropy = function(_CrossEntropy)


def _launch_forward(
    logits: Tensor, targets: Targets, options: Options, backend: str, loss: Tensor, lse: Tensor
) -> None:
    check_range("cross_entropy", targets.target, options)
    launchers(__package__, backend).cross_entropy_forward(logits, targets, options, backend, loss, lse)


@operator(strided="logits", launch=_launch_forward)
def cross_entropy_forward(logits: Tensor, targets: Targets, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exp of each row; of a shard, its share of both (csrc/cross_entropy.h)."""
    loss = torch.empty(targets.target.shape[0], dtype=torch.float32, device=logits.device)
    return loss, empty_like(loss)


def _launch_backward(
    logits: Tensor, targets: Targets, lse: Tensor, upstream: Upstream, options: Options, backend: str, dlogits: Tensor
) -> None:
    """``dlogits`` is contiguous, and may be ``logits``; ``dloss`` may have stride 0: one value for all rows."""
    kernels = launchers(__package__, backend)
    kernels.cross_entropy_backward(logits, targets, lse, upstream, options, backend, dlogits)


def _launch_inplace(logits: Tensor, *rest: Any) -> None:
    if logits.numel():
        _launch_backward(*(logits, *rest, logits))


@operator(strided="logits dloss", launch=_launch_backward)
def cross_entropy_backward(
    logits: Tensor, targets: Targets, lse: Tensor, upstream: Upstream, options: Options, backend: str
) -> Tensor:
    return empty_like(logits)


@operator(strided="dloss", launch=_launch_inplace, mutates="logits")
def cross_entropy_backward_(
    logits: Tensor, targets: Targets, lse: Tensor, upstream: Upstream, options: Options, backend: str
) -> None:
    """Writes the gradient over ``logits``."""


# ---- what the losses share ----


PROBABILITIES = "target holds probabilities, which its kernel does not take"


def z_apart(options: Options, weight: Tensor | None, reduction: str) -> tuple[Options, float]:
    """``options``, and the z_loss that is not in them but left to :func:`reduce`: its mean is without weights."""
    if weight is None or reduction != "mean":
        return options, 0.0
    return options._replace(z_loss=0.0), options.z_loss


def reduce(loss: Tensor, lse: Tensor, z: float, targets: Targets, options: Options, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    target, weight, _ = targets
    mean = loss.sum() / reference.normaliser(target, weight, options.ignore_index, loss.dtype)
    if z:
        squares = torch.where(target != options.ignore_index, lse, 0.0).square().sum()
        mean = mean + z * squares / reference.normaliser(target, None, options.ignore_index, loss.dtype)
    return mean


def torch_loss(
    op: str, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, reduction: str, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The torch backend: PyTorch's own cross_entropy for what that can express, else the specification."""
    ignore_index, label_smoothing, z_loss, softcap, *_ = options  # scale is 1
    given: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if target.is_floating_point():
        loss, lse = reference.cross_entropy_of_probabilities(
            logits, target, weight=weight, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            reduction=reduction,
        )  # fmt: skip
        return (loss, lse) if return_lse else loss
    check_range(op, target, options)
    if return_lse or z_loss or softcap:
        loss, lse = reference.cross_entropy(
            logits, target, weight=weight, z_loss=z_loss, softcap=softcap, reduction=reduction, **given
        )
        return (loss, lse) if return_lse else loss
    wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if weight is None else weight.to(wide.dtype)
    index = target.reshape(-1).long()
    wide = wide.masked_fill((index == ignore_index).unsqueeze(-1), 0.0)  # an ignored row may hold inf or NaN
    loss = F.cross_entropy(wide, index, weight=weight, reduction="none", **given)
    loss = reduce(loss, loss, 0.0, Targets(index, weight, None), options, reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def check_range(op: str, target: Tensor, options: Options) -> None:
    """Raise where a target is no class: always on a CPU; on a GPU, which must be waited for, when debugging."""
    if (target.is_cpu or checks.DEBUG) and target.numel() and has_values():
        low, high = target.aminmax()
        if low.item() >= 0 and high.item() < options.classes:
            return
        out = (target != options.ignore_index) & ((target < 0) | (target >= options.classes))
        if out.any():
            raise IndexError(
                f"{op}: target holds {target[out][0].item()}, which is neither in [0, {options.classes}) "
                f"nor the ignore_index {options.ignore_index}"
            )


def check_target(op: str, name: str, x: Tensor, target: Tensor, probabilities: int | None = None) -> None:
    """``probabilities``: of how many classes the target may hold them; None: of none."""
    checks.on(op, "target", target, name, x)
    if probabilities is not None and target.is_floating_point():
        if target.dim() < x.dim():
            raise TypeError(
                f"{op}: target must be int64 or int32, not {checks.short(target.dtype)}, or hold the probabilities of "
                f"the classes, [..., {probabilities}]"
            )
        checks.not_wider(op, "target", target, name, x)
        checks.sized(op, "target", target, (*x.shape[:-1], probabilities))
        return
    checks.indices(op, "target", target, name, x)
    checks.sized(op, "target", target, x.shape[:-1])


def check_classes(op: str, classes: int) -> None:
    if classes == 0:
        raise ValueError(f"{op}: there are no classes; the last dimension must have at least one")


def check_class_weight(op: str, name: str, weight: Tensor | None, x_name: str, x: Tensor, classes: int) -> None:
    if weight is not None:
        checks.parameter(op, name, weight, x_name, x, (classes,))
        if weight.requires_grad:
            raise ValueError(f"{op}: {name} gets no gradient; pass {name}.detach()")


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")


def check_options(
    op: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int,
    classes: int,
    temperature: float = 1.0,
) -> Options:
    smoothing = checks.number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, not {smoothing}")
    z_loss, softcap = checks.number(op, "z_loss", z_loss), checks.softcap(op, softcap)
    ignore_index = checks.integer(op, "ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must fit in 64 bits, as target does, it is {ignore_index}")
    temperature = checks.number(op, "temperature", temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be a finite number above 0, not {temperature}")
    return Options(ignore_index, smoothing, z_loss, softcap, 1.0 / temperature, first_class, classes)
