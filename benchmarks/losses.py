"""Softmax, cross-entropy, and the head with its loss.

Bytes that must move, in tensors of [rows, columns]: softmax forward 2 (read x, write y), forward and backward 5 (and
read y and dy, write dx); causal softmax 1.5 (half is read); cross_entropy forward and backward 3 (read twice, write the
gradient once). linear_cross_entropy is bound by its three matrix products, 6 · tokens · features · classes operations;
"products" times these alone. Its memory is what a call holds at its peak beyond its inputs, gradients included.
linear_jsd has a fourth product, the teacher's logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import cross_entropy, linear_cross_entropy, linear_jsd, linear_log_prob, softmax

from . import peers
from .cases import COPY, OURS, PRODUCTS, PYTORCH, Call, Case, Scale, baselines, ours, short, step_of
from .timing import DEVICE


def cases(scale: Scale) -> Iterator[Case]:
    for shape in scale.pick([(32768, 4096), (16384, 32768), (4096, 262144)], [(8192, 2048)], [(4096, 2048)]):
        for dtype in scale.dtypes:
            for backward in scale.directions:
                yield _softmax(shape, dtype, backward)
    for dtype in scale.dtypes:
        yield _causal_softmax(*scale.pick((64, 4096), (4, 2048), (2, 1024)), dtype)
    for shape in scale.pick([(16384, 32000), (8192, 131072), (4096, 262144)], [(2048, 32000)], [(512, 32000)]):
        for dtype in scale.dtypes:
            yield _cross_entropy(shape, dtype)
    heads = scale.pick([(16384, 4096, 32000), (16384, 4096, 128256)], [(2048, 768, 32000)], [(256, 512, 16000)])
    for size in heads:
        for dtype in scale.dtypes:
            yield _head(*size, dtype)
        yield _log_prob(*size, torch.bfloat16)
        yield _log_prob(*size, torch.bfloat16, entropy=True)
        yield _distillation(*size, torch.bfloat16)
    if not scale.quick:
        features, tokens, classes = scale.pick((4096, 8192, 32768), (256, 1024, 16384), None)
        for n in scale.pick([2**n for n in range(13, 18)], [2**n for n in range(12, 17)], None):
            yield _head(tokens, features, n, torch.bfloat16, sweep="classes", at=n)
        for n in scale.pick([2**n for n in range(10, 15)], [2**n for n in range(8, 13)], None):
            yield _head(n, features, classes, torch.bfloat16, sweep="tokens", at=n)


def _direction(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def eager_softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _softmax(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build() -> dict[str, Call]:
        x, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        copy = (lambda: (x.clone(), g.clone())) if backward else x.clone
        ops = baselines(eager_softmax) | ours(softmax) | peers.softmax()
        return {COPY: copy} | {name: step_of(op, [x], g if backward else None) for name, op in ops.items()}

    names = (COPY, *baselines(eager_softmax), *ours(softmax), *peers.softmax())
    moved = (5 if backward else 2) * shape[0] * shape[1] * dtype.itemsize
    size = f"{shape[0]}×{shape[1]}"
    return Case("softmax", size, _direction(backward), short(dtype), moved, "GB/s", names, build)


def _causal_softmax(heads: int, n: int, dtype: torch.dtype) -> Case:
    """Scores of attention: scaled, with the future masked."""

    def build() -> dict[str, Call]:
        x = torch.randn(heads, n, n, dtype=dtype, device=DEVICE)
        future = torch.ones(n, n, dtype=torch.bool, device=DEVICE).triu(1)

        def eager(x: Tensor) -> Tensor:
            return (x * 0.125).masked_fill(future, float("-inf")).softmax(-1)

        ops = baselines(eager) | ours(softmax, scale=0.125, causal=True)
        return {name: step_of(op, [x], None) for name, op in ops.items()}

    names = (*baselines(eager_softmax), *ours(softmax))
    moved = 1.5 * heads * n * n * dtype.itemsize
    return Case("softmax, causal", f"{heads}×{n}×{n}", "forward", short(dtype), moved, "GB/s", names, build)


def _cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> Case:
    in_place = {f"{name}, in place": op for name, op in ours(cross_entropy, inplace_backward=True).items()}
    ops = ours(cross_entropy) | in_place | peers.cross_entropy()

    def build() -> dict[str, Call]:
        logits = torch.randn(shape, dtype=dtype, device=DEVICE)
        target = torch.randint(shape[1], shape[:1], device=DEVICE)

        def step(op: Call) -> None:
            # A new view each time: written over, its numbers are a gradient's, which costs no other time.
            op(logits.detach().requires_grad_(), target).backward()

        every = baselines(F.cross_entropy) | ops
        return {COPY: logits.clone} | {name: partial(step, op) for name, op in every.items()}

    moved = 3 * shape[0] * shape[1] * dtype.itemsize
    names = (COPY, *baselines(F.cross_entropy), *ops)
    size = f"{shape[0]}×{shape[1]}"
    return Case("cross_entropy", size, "forward+backward", short(dtype), moved, "GB/s", names, build)


def eager_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def eager_log_prob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def eager_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own chunked form, which came with 2.13."""
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _inputs(tokens: int, features: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, features, dtype=dtype, device=DEVICE)
    weight = (torch.randn(classes, features, device=DEVICE) * features**-0.5).to(dtype)
    return hidden, weight, torch.randint(classes, (tokens,), device=DEVICE)


def _head(tokens: int, features: int, classes: int, dtype: torch.dtype, sweep: str = "", at: int = 0) -> Case:
    ops = baselines(eager_head, compiled=not sweep)
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and not sweep:
        ops[f"{PYTORCH}, chunked"] = chunked
    one = {OURS: linear_cross_entropy} if sweep else ours(linear_cross_entropy)
    ops |= one | peers.linear_cross_entropy()

    def build() -> dict[str, Call]:
        hidden, weight, target = _inputs(tokens, features, classes, dtype)

        def products() -> None:
            logits = hidden @ weight.t()
            logits @ weight, logits.t() @ hidden

        grad = torch.ones((), device=DEVICE)
        calls = {
            name: step_of(lambda h, w, op=op: op(h, w, target), [hidden, weight], grad) for name, op in ops.items()
        }
        return {PRODUCTS: products} | calls

    return Case(
        "linear_cross_entropy", f"{tokens}×{features}×{classes}", "forward+backward", short(dtype),
        6 * tokens * features * classes, "TFLOP/s", (PRODUCTS, *ops), build, sweep, at,
    )  # fmt: skip


def _log_prob(tokens: int, features: int, classes: int, dtype: torch.dtype, entropy: bool = False) -> Case:
    """The backward computes the logits again: 8 operations a token, feature and class."""
    ops = baselines(eager_entropy if entropy else eager_log_prob, compiled=False)
    ops |= ours(linear_log_prob, return_entropy=True) if entropy else ours(linear_log_prob)

    def build() -> dict[str, Call]:
        hidden, weight, target = _inputs(tokens, features, classes, dtype)
        grad = torch.ones((), device=DEVICE)

        def added(op: Call, h: Tensor, w: Tensor) -> Tensor:
            return sum(x.sum() for x in op(h, w, target)) if entropy else op(h, w, target).sum()

        return {name: step_of(partial(added, op), [hidden, weight], grad) for name, op in ops.items()}

    work = 8 * tokens * features * classes
    size = f"{tokens}×{features}×{classes}"
    name = "linear_log_prob, entropy" if entropy else "linear_log_prob"
    return Case(name, size, "forward+backward", short(dtype), work, "TFLOP/s", tuple(ops), build)


def eager_jsd(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """With beta 1/2, as TRL computes it."""
    with torch.no_grad():
        log_p = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    log_q = F.linear(hidden, weight).float().log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    both = sum(F.kl_div(log_m, log_x, reduction="none", log_target=True).sum(-1) for log_x in (log_p, log_q))
    return both.mean() / 2


def _distillation(tokens: int, features: int, classes: int, dtype: torch.dtype) -> Case:
    """Of a teacher of the student's size: 8 operations a token, feature and class."""
    ops = baselines(eager_jsd) | ours(linear_jsd)

    def build() -> dict[str, Call]:
        models = [_inputs(tokens, features, classes, dtype)[:2] for _ in range(2)]
        (hidden, weight), teacher = models
        grad = torch.ones((), device=DEVICE)
        return {
            name: step_of(lambda h, w, op=op: op(h, w, *teacher), [hidden, weight], grad) for name, op in ops.items()
        }

    work = 8 * tokens * features * classes
    size = f"{tokens}×{features}×{classes}"
    return Case("linear_jsd", size, "forward+backward", short(dtype), work, "TFLOP/s", tuple(ops), build)
