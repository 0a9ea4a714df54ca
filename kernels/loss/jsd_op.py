"""``linear_jsd``: two language models' heads and the divergence of their distributions, chunk by chunk.

As in ``linear_op``: with reduction "mean" or "sum" the gradients are computed with the loss, and each model's logits
once; with "none", and in float16, the backward computes them a second time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, function, launchers, operator
from . import reference
from .cross_entropy_op import check_classes, check_reduction
from .linear_chunks import Linear, Products, Wanted
from .linear_op import _gradients, _logits, _parameter
from .options import Divergence


class Teacher(NamedTuple):
    """The layer of the model whose distribution is the target, and gets no gradient; and which tokens count,
    ``[tokens]`` boolean, None: all."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    mask: Tensor | None


@backends.op("cuda", "triton", "cpu")
def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    accumulate_float32: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of a student's distribution from a teacher's: the loss of distillation,
    without ever holding all the logits of either (Agarwal et al. 2023, GKD, arXiv:2306.13649).

    With ``p = softmax((teacher_hidden @ teacher_weightᵀ + teacher_bias) / temperature)``, and q the same of the
    student's, the loss of a token is

    - ``KL(p‖q)`` for beta 0, the forward KL: the student covers all that the teacher says;
    - ``KL(q‖p)`` for beta 1, the reverse KL: it says nothing that the teacher would not;
    - ``beta · KL(p‖m) + (1 - beta) · KL(q‖m)`` with ``m = beta · p + (1 - beta) · q`` between, as in TRL's GKDTrainer
      and Liger kernel. Near 0 and 1 this is near 0, and not near the forward and reverse KL.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16. Under autocast it is cast as for a linear layer.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it. Under autocast
            any dtype.
        teacher_hidden: ``[..., teacher_features]``, in the dtype of hidden; for each token that of hidden. It gets no
            gradient, nor do teacher_weight and teacher_bias.
        teacher_weight: ``[classes, teacher_features]``, in the dtype of hidden or float32.
        bias, teacher_bias: ``[classes]`` or None, in the dtype of hidden or float32.
        mask: ``[...]`` boolean, which tokens count; None: all. The others' loss and gradient are 0, whatever their
            logits are; their hidden must be finite for the gradient of weight.
        beta: from 0 to 1, the teacher's share of the mixture.
        temperature: positive; what the logits are divided by. The loss is not multiplied by its square, which makes up
            for gradients that fall with it (Hinton et al. 2015): do that yourself where it is wanted.
        reduction: ``"mean"`` (over the tokens that count; 0 where none does), ``"sum"`` or ``"none"``.
        accumulate_float32: as in :func:`linear_cross_entropy`.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        The loss in nats, float32: a scalar, or ``[...]`` with reduction "none".

    Memory: beyond the gradients, a chunk of each model's logits, as in :func:`linear_cross_entropy`; as there the
    gradients of hidden and weight are computed by the forward with reduction "mean" and "sum", but in float16.

    Raises:
        TypeError: a dtype or type that it does not take, a DTensor. ValueError: a wrong shape, device, beta,
            temperature or reduction, or a ``backend`` that can't run this call.
    """
    student = _layer("", hidden, weight, bias)
    teacher = _layer("teacher_", teacher_hidden, teacher_weight, teacher_bias).detach()
    hidden, weight, bias = student
    checks.like(
        "linear_jsd", "teacher_hidden", teacher.hidden, "hidden", hidden,
        shape=(*hidden.shape[:-1], teacher.hidden.shape[-1]),
    )  # fmt: skip
    checks.sized("linear_jsd", "teacher_weight", teacher.weight, (weight.shape[0], teacher.hidden.shape[-1]))
    check_classes("linear_jsd", weight.shape[0])
    _check_mask(mask, hidden)
    check_reduction("linear_jsd", reduction)
    divergence = _divergence(beta, temperature)
    chosen = backends.select("linear_jsd", hidden, backend)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        return reference.jsd(
            _logits(*student), _logits(*teacher), mask=mask, beta=float(beta), temperature=float(temperature),
            reduction=reduction,
        )  # fmt: skip
    tokens, flat = hidden.shape[:-1].numel(), None if mask is None else mask.reshape(-1)
    target = Teacher(teacher.hidden, teacher.weight, teacher.bias, flat)
    factor = torch.ones((), dtype=torch.float32, device=hidden.device)
    if reduction == "mean":
        factor = factor / (max(tokens, 1) if flat is None else flat.count_nonzero().clamp(min=1))
    # float16 gradients without the caller's loss scale would underflow: it must be known first
    if reduction == "none" or hidden.dtype == torch.float16:
        loss = _per_token(hidden, weight, bias, target, divergence, accumulate_float32, chosen)
        return loss.view(hidden.shape[:-1]) if reduction == "none" else loss.sum() * factor
    wanted = Wanted.of(hidden, weight, bias, accumulate_float32)
    return _reduced(hidden, weight, bias, target, factor, divergence, wanted, chosen)[0]


class _Reduced(torch.autograd.Function):
    """``factor`` times the sum of the losses, and their gradients, which are computed with them."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher,
        factor: Tensor,
        divergence: Divergence,
        wanted: Wanted,
        backend: str,
    ) -> tuple[Tensor, ...]:
        linear, grads = Linear(hidden, weight, bias), ()
        if any(wanted[:3]):
            upstream = factor.expand(hidden.shape[:-1].numel())
            loss, *grads = linear_jsd_with_gradients(linear, teacher, upstream, wanted, divergence, backend)
        else:
            loss = linear_jsd_forward(linear, teacher, divergence, backend)
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
        grads = [None if g is None else differentiable_once("linear_jsd", hidden, g * by) for g in grads]
        return *grads, *(None,) * 5


class _PerToken(torch.autograd.Function):
    """The loss of each token; the backward computes the logits again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher,
        divergence: Divergence,
        accumulate_float32: bool,
        backend: str,
    ) -> Tensor:
        return linear_jsd_forward(Linear(hidden, weight, bias), teacher, divergence, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *linear, teacher, ctx.divergence, ctx.accumulate_float32, ctx.backend = inputs
        ctx.save_for_backward(*linear, *teacher)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        linear, teacher = Linear(*ctx.saved_tensors[:3]), Teacher(*ctx.saved_tensors[3:])
        needed = ctx.needs_input_grad[:3]
        wanted = Wanted._make((*needed, ctx.accumulate_float32))
        _, *grads = linear_jsd_with_gradients(linear, teacher, dloss, wanted, ctx.divergence, ctx.backend)
        grads = [
            differentiable_once("linear_jsd", linear.hidden, g) if need else None
            for g, need in zip(grads, needed, strict=True)
        ]
        return *grads, *(None,) * 4


_reduced, _per_token = function(_Reduced), function(_PerToken)


# ---- operators ----

_STRIDED = "hidden weight bias teacher_hidden teacher_weight teacher_bias"


def _of_each_token(linear: Linear) -> Tensor:
    return linear.hidden.new_empty(linear.hidden.shape[:-1].numel(), dtype=torch.float32)


def _launch_forward(linear: Linear, teacher: Teacher, divergence: Divergence, backend: str, loss: Tensor) -> None:
    _run_chunks(linear, teacher, None, divergence, False, backend, loss)


@operator(strided=_STRIDED, launch=_launch_forward)
def linear_jsd_forward(linear: Linear, teacher: Teacher, divergence: Divergence, backend: str) -> Tensor:
    """The loss of each token."""
    return _of_each_token(linear)


def _launch_with_gradients(
    linear: Linear,
    teacher: Teacher,
    dloss: Tensor,
    wanted: Wanted,
    divergence: Divergence,
    backend: str,
    loss: Tensor,
    *grads: Tensor,
) -> None:
    _run_chunks(linear, teacher, dloss, divergence, wanted.accumulate_float32, backend, loss, grads)


@operator(strided=f"{_STRIDED} dloss", launch=_launch_with_gradients)
def linear_jsd_with_gradients(
    linear: Linear, teacher: Teacher, dloss: Tensor, wanted: Wanted, divergence: Divergence, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each token, and the gradients of ``dloss`` times them; ``dloss`` may have stride 0."""
    return _of_each_token(linear), *_gradients(linear, wanted)


@torch.no_grad()
def _run_chunks(
    linear: Linear,
    teacher: Teacher,
    dloss: Tensor | None,
    divergence: Divergence,
    accumulate_float32: bool,
    backend: str,
    loss: Tensor,
    grads: tuple[Tensor, ...] = (),
) -> None:
    kernels, tokens = launchers(__package__, backend), len(loss)
    mask = teacher.mask
    students = Products(linear, tokens, grads, accumulate_float32)
    teachers = Products(Linear(*teacher[:3]), tokens, (), False)
    for chunk in students.chunks:
        logits = students.logits(chunk)
        kernels.jsd(
            logits, teachers.logits(chunk), None if mask is None else mask[chunk],
            None if dloss is None else dloss[chunk], divergence, backend, loss[chunk],
            None if dloss is None else logits,
        )  # fmt: skip
        if grads:
            students.backward(chunk, logits)
    students.finish()


# ---- arguments ----


def _layer(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Linear:
    """The layer of one model, whose arguments' names begin with ``model``: checked, and cast as ``F.linear`` casts it
    under autocast; float32 parameters are rounded later, where they are read."""
    name = f"{model}hidden"
    checks.floating("linear_jsd", name, hidden)
    checks.tensor("linear_jsd", f"{model}weight", weight)
    if weight.dim() != 2:
        raise ValueError(
            f"linear_jsd: {model}weight must be [classes, {model}features], it has shape {list(weight.shape)}"
        )
    (hidden,) = checks.autocast(hidden)
    classes, features = weight.shape[0], hidden.shape[-1]
    return Linear(
        hidden,
        _parameter("linear_jsd", f"{model}weight", weight, hidden, (classes, features), name),
        None if bias is None else _parameter("linear_jsd", f"{model}bias", bias, hidden, (classes,), name),
    )


def _check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    if mask is None:
        return
    checks.on("linear_jsd", "mask", mask, "hidden", hidden)
    if mask.dtype != torch.bool:
        raise TypeError(f"linear_jsd: mask must be boolean, not {checks.short(mask.dtype)}")
    checks.sized("linear_jsd", "mask", mask, hidden.shape[:-1])


def _divergence(beta: float, temperature: float) -> Divergence:
    beta, temperature = (checks.number("linear_jsd", n, x) for n, x in (("beta", beta), ("temperature", temperature)))
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"linear_jsd: beta must be between 0 and 1, not {beta}")
    if not 1e-30 < temperature < math.inf:
        raise ValueError(f"linear_jsd: temperature must be positive, not {temperature}")
    return Divergence(max(beta, 1e-30) if beta else 0.0, 1.0 - beta, 1.0 / temperature)
