"""``linear_cross_entropy`` and ``linear_log_prob``: a language model's head and its loss, chunk by chunk.

Three matrix products dominate: logits, and the gradients of hidden and weight. Where the gradient of the loss
is known beforehand up to one factor (reduction "mean" or "sum"), it is computed with the loss, chunk by chunk,
and the logits never again (as Liger kernel does, Hsu et al. 2024, arXiv:2410.10989). Elsewhere the backward
computes each chunk of logits a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, register
from ..native import multiplies_bfloat16
from . import reference
from .cross_entropy_op import check_loss, check_range, check_target, class_weights, reduce, torch_loss
from .launchers import launchers
from .options import SCHEMA, Options

NO_IGNORE_INDEX = -(2**63)


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
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it.
        target: ``[...]`` int64 or int32, in ``[0, classes)`` or ``ignore_index``.
        bias: ``[classes]`` or None, in the dtype of hidden or float32.
        class_weight: ``[classes]``, cross_entropy's ``weight``.
        accumulate_float32: add up the chunks' gradients of weight in float32, which takes
            ``4 · classes · features`` bytes while it lasts; else in the dtype of hidden. The gradient of bias is
            always added up in float32, and that of hidden is one product, which takes no adding up.

    The other arguments, the results and the errors are those of :func:`cross_entropy`.

    Memory: beyond the gradients, one chunk of logits, ``chunk · classes`` elements in the dtype of hidden, where
    ``chunk`` is a fifth of the tokens, but at least 256 and at most 2048 (:func:`chunk_size`); on CPUs that multiply no
    matrices in that dtype, a float32 chunk and a float32 copy of weight. With reduction
    "mean" or "sum", no return_lse, and a dtype other than float16, the forward computes the gradients of hidden
    and weight too and holds them for the backward, which only scales them (in new memory, unless the factor is 1
    on a CPU, as it is in ``loss.backward()``). Otherwise the backward computes the logits again: one more matrix
    product, and nothing held.

    A DTensor (an FSDP2 parameter outside its module's forward) raises: see the message.
    """
    _check_linear("linear_cross_entropy", hidden, weight, target, bias)
    check_loss(
        "linear_cross_entropy", "hidden", hidden, weight.shape[0], class_weight, label_smoothing, reduction,
        "class_weight",
    )  # fmt: skip
    hidden = _autocast(hidden)
    chosen = backends.select("linear_cross_entropy", hidden, backend)
    if isinstance(chosen, backends.Explanation):
        return chosen
    if chosen == "torch":
        return torch_loss(
            _logits(hidden, weight, bias), target, return_lse, weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
        )  # fmt: skip
    options = Options(ignore_index, float(label_smoothing), float(z_loss), float(softcap), 0, weight.shape[0])
    class_weight, mean_weight = class_weights(class_weight)
    index = target.reshape(-1).long()
    tensors = (hidden, weight, bias, index, class_weight, mean_weight)
    # float16 gradients without the caller's loss scale would underflow: it must be known first
    if reduction == "none" or return_lse or hidden.dtype == torch.float16:
        loss, lse = _PerToken.apply(*tensors, options, accumulate_float32, chosen)
        loss = reduce(loss.view(target.shape), target, class_weight, ignore_index, reduction)
        return (loss, lse.view(target.shape)) if return_lse else loss
    factor = torch.ones((), dtype=torch.float32, device=hidden.device)
    if reduction == "mean":
        factor = factor / reference.normaliser(index, class_weight, ignore_index, torch.float32)
    return _Reduced.apply(*tensors, factor, options, accumulate_float32, chosen)


@backends.op("cuda", "triton", "cpu")
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

    For preference losses and evaluation. The logits are never held whole: the memory is that of
    :func:`linear_cross_entropy`, and the backward computes each chunk of logits again.

    Args:
        hidden: ``[..., features]``, float32, float16 or bfloat16. Under autocast it is cast as for a linear layer.
        weight: ``[classes, features]``, in the dtype of hidden, or float32, which is rounded to it.
        target: ``[...]`` int64 or int32, in ``[0, classes)``.
        bias: ``[classes]`` or None, in the dtype of hidden or float32.
        softcap: c > 0 replaces each logit l by ``c·tanh(l/c)``.
        backend: see ``explain``.

    Returns:
        ``[...]`` float32.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device. IndexError: a
            target out of range (on a GPU: NaN, see :func:`cross_entropy`).
    """
    _check_linear("linear_log_prob", hidden, weight, target, bias)
    check_loss("linear_log_prob", "hidden", hidden, weight.shape[0], None, 0.0, "none")
    hidden = _autocast(hidden)
    chosen = backends.select("linear_log_prob", hidden, backend)
    if isinstance(chosen, backends.Explanation):
        return chosen
    if chosen == "torch":
        return reference.log_prob(_logits(hidden, weight, bias), target, softcap=softcap)
    options = Options(NO_IGNORE_INDEX, 0.0, 0.0, float(softcap), 0, weight.shape[0])
    loss, _ = _PerToken.apply(hidden, weight, bias, target.reshape(-1).long(), None, None, options, False, chosen)
    return -loss.view(target.shape)


class _Reduced(torch.autograd.Function):
    """``factor`` times the sum of the losses; their gradients are computed with them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        mean_weight: Tensor | None,
        factor: Tensor,
        options: Options,
        accumulate_float32: bool,
        backend: str,
    ) -> Tensor:
        tensors = (hidden, weight, bias, target, class_weight, mean_weight)
        wanted = ctx.needs_input_grad[:3]
        if any(wanted):
            loss, dhidden, dweight, dbias = torch.ops.fastllm.linear_cross_entropy_with_gradients(
                *tensors, factor, *wanted, accumulate_float32, *options, backend
            )
            grads = (g if w else None for g, w in zip((dhidden, dweight, dbias), wanted, strict=True))
            ctx.save_for_backward(hidden, *grads)
        else:
            loss, _ = torch.ops.fastllm.linear_cross_entropy_forward(*tensors, *options, backend)
        return loss.sum() * factor

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *grads = ctx.saved_tensors
        known = by.device.type == "cpu" and type(by) is Tensor and not torch.compiler.is_compiling()
        if not (known and by == 1):
            grads = [None if g is None else g * by for g in grads]
        grads = [differentiable_once("linear_cross_entropy", hidden, g) for g in grads]
        return *grads, *(None,) * 7


class _PerToken(torch.autograd.Function):
    """(loss, lse) of each token; the backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        mean_weight: Tensor | None,
        options: Options,
        accumulate_float32: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tensors = (hidden, weight, bias, target, class_weight, mean_weight)
        loss, lse = torch.ops.fastllm.linear_cross_entropy_forward(*tensors, *options, backend)
        ctx.save_for_backward(*tensors, lse)
        ctx.options, ctx.accumulate_float32, ctx.backend = options, accumulate_float32, backend
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None and dlse is None:
            return (None,) * 9
        wanted = ctx.needs_input_grad[:3]
        grads = torch.ops.fastllm.linear_cross_entropy_backward(
            *ctx.saved_tensors, dloss, dlse, *wanted, ctx.accumulate_float32, *ctx.options, ctx.backend
        )
        hidden = ctx.saved_tensors[0]
        grads = [
            differentiable_once("linear_cross_entropy", hidden, g) if w else None
            for g, w in zip(grads, wanted, strict=True)
        ]
        return *grads, *(None,) * 6


# ---- operators ----

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? mean_weight"
_WANTED = "bool need_hidden, bool need_weight, bool need_bias, bool accumulate_float32"


def _row_outputs(target: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(target.new_empty(target.shape, dtype=torch.float32) for _ in range(2))


def _gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; empty where none is wanted."""
    return tuple(
        t.new_empty(t.shape if want else (0,)) if t is not None else hidden.new_empty(0)
        for t, want in zip((hidden, weight, bias), wanted, strict=True)
    )


@register(
    f"linear_cross_entropy_forward({_INPUTS}, {SCHEMA}, str backend) -> (Tensor loss, Tensor lse)",
    fake=lambda hidden, weight, bias, target, *_: _row_outputs(target),
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    tensors, options = inputs[:6], Options(*inputs[6:])
    loss, lse = _row_outputs(tensors[3])
    _run(*tensors, options, backend, loss=loss, lse=lse)
    return loss, lse


def _fake_with_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _row_outputs(target)[0], *_gradients(hidden, weight, bias, *rest[3:6])


@register(
    f"linear_cross_entropy_with_gradients({_INPUTS}, Tensor factor, {_WANTED}, {SCHEMA}, str backend)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake_with_gradients,
)
def _with_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss of each token, and the gradients of ``factor`` times their sum."""
    *inputs, backend = arguments
    tensors, factor, wanted, accumulate = inputs[:6], inputs[6], inputs[7:10], inputs[10]
    loss, lse = _row_outputs(tensors[3])
    grads = _gradients(*tensors[:3], *wanted)
    _run(
        *tensors, Options(*inputs[11:]), backend, loss=loss, lse=lse, dloss=factor.expand(loss.shape), grads=grads,
        accumulate_float32=accumulate,
    )  # fmt: skip
    return loss, *grads


@register(
    f"linear_cross_entropy_backward({_INPUTS}, Tensor lse, Tensor? dloss, Tensor? dlse, {_WANTED}, {SCHEMA},"
    " str backend) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=lambda hidden, weight, bias, *rest: _gradients(hidden, weight, bias, *rest[6:9]),
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, backend = arguments
    tensors, (lse, dloss, dlse), wanted, accumulate = inputs[:6], inputs[6:9], inputs[9:12], inputs[12]
    grads = _gradients(*tensors[:3], *wanted)
    dlse = None if dlse is None else dlse.contiguous()
    _run(
        *tensors, Options(*inputs[13:]), backend, lse=lse, dloss=dloss, dlse=dlse, grads=grads,
        accumulate_float32=accumulate,
    )  # fmt: skip
    return grads


def chunk_size(tokens: int) -> int:
    """Tokens whose logits are held at a time: a fifth of them, in sixteens, but 256 to 2048. PyTorch holds three
    times all of them, so this is a fifteenth; fewer would keep the matrix products from their speed."""
    fifth = -(-tokens // 80) * 16
    return max(1, min(tokens, max(256, min(2048, fifth))))


@torch.no_grad()
def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    mean_weight: Tensor | None,
    options: Options,
    backend: str,
    *,
    lse: Tensor,
    loss: Tensor | None = None,
    dloss: Tensor | None = None,
    dlse: Tensor | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    accumulate_float32: bool = False,
) -> None:
    """Chunk by chunk: the logits; into ``loss`` and ``lse``, where a loss is given, the forward; into ``grads``,
    where they are, the backward."""
    check_range("linear_cross_entropy", target, options)
    kernels = launchers(backend)
    features = hidden.shape[-1]
    dtype = _product_dtype(hidden)
    rows, head = hidden.reshape(-1, features).to(dtype), weight.to(hidden.dtype).to(dtype)
    bias = None if bias is None else bias.to(hidden.dtype).to(dtype)
    dhidden, dweight, dbias = grads or (hidden.new_empty(0),) * 3
    weight_sum = _Sum(dweight, torch.float32 if accumulate_float32 else dtype)
    bias_sum = torch.zeros_like(dbias, dtype=torch.float32)
    tokens, step = len(target), chunk_size(len(target))
    buffer = hidden.new_empty(step, options.classes, dtype=dtype)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        h, logits = rows[part], buffer[: part.stop - start]
        shared = (logits, target[part], class_weight, mean_weight)
        _product(h, head, bias, logits)
        if loss is not None:
            kernels.cross_entropy_forward(*shared, loss[part], lse[part], options, backend)
        if grads is None:
            continue
        upstream = (None if g is None else g[part] for g in (dloss, dlse))
        kernels.cross_entropy_backward(*shared, lse[part], *upstream, logits, options, backend)
        if dhidden.numel():
            out = dhidden.view(-1, features)[part]
            wide = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
            out.copy_(torch.mm(logits, head, out=wide))  # onto itself: nothing; without out= autocast would narrow it
        if dweight.numel():
            weight_sum.add(logits, h)
        if dbias.numel():
            bias_sum += logits.sum(0, dtype=torch.float32)
    weight_sum.finish()
    dbias.copy_(bias_sum)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """float32 on a CPU that can't multiply matrices in a narrower dtype: PyTorch would imitate it at a fifth of the
    speed."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32:
        return hidden.dtype
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def _product(hidden: Tensor, head: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """``logits = hidden @ headᵀ + bias``. On a CPU in float32 in blocks of classes that a cache holds: in one
    piece PyTorch's product reads the head's columns too far apart, and takes a third longer."""
    blocks = 1024 if hidden.device.type == "cpu" and hidden.dtype == torch.float32 else len(head)
    for start in range(0, len(head), blocks):
        part = slice(start, start + blocks)
        if bias is None:
            torch.mm(hidden, head[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], hidden, head[part].t(), out=logits[:, part])


class _Sum:
    """The sum of ``a.t() @ b`` over chunks, in ``dtype``, into ``out``."""

    BLOCK = 4096  # rows of a product that waits to be added in another dtype

    def __init__(self, out: Tensor, dtype: torch.dtype) -> None:
        self.out, self.total, self.empty = (
            out,
            out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype),
            True,
        )

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.total.dtype == b.dtype:
            if self.empty:
                torch.mm(a.t(), b, out=self.total)
            else:
                torch.addmm(self.total, a.t(), b, out=self.total)
        else:
            for total, columns in zip(self.total.split(self.BLOCK), a.split(self.BLOCK, 1), strict=True):
                product = torch.mm(columns.t(), b)
                total.copy_(product) if self.empty else total.add_(product)
        self.empty = False

    def finish(self) -> None:
        if self.empty:
            self.total.zero_()
        if self.total is not self.out:
            self.out.copy_(self.total)


def _autocast(hidden: Tensor) -> Tensor:
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _check_linear(op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    checks.floating(op, "hidden", hidden)
    checks.tensor(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [classes, features], it has shape {list(weight.shape)}")
    checks.parameter(op, "weight", weight, "hidden", hidden, (weight.shape[0], hidden.shape[-1]))
    check_target(op, "hidden", hidden, target)
    if bias is not None:
        checks.parameter(op, "bias", bias, "hidden", hidden, (weight.shape[0],))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
