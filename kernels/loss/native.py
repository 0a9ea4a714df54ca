"""Softmax and the losses on it in the native module: C++ on CPUs, CUDA C++ on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import KERNELS, as_rows, merged_dims, place
from .options import Divergence, Options, Targets, Upstream

NO_MASK, BOOLEAN, ADDITIVE, ADDITIVE_FLOAT32 = range(4)  # csrc/softmax.h's MaskKind


def as_mask(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """``mask`` broadcast to ``x``, as csrc/softmax.h addresses it: ``([outer, middle, inner, cols], kind)``.

    Dimensions that are broadcast stay so, without a copy, but for the last one, and where the rest needs more than
    three strides.
    """
    if mask is None:
        return None, NO_MASK
    if mask.is_floating_point() and mask.dtype not in (x.dtype, torch.float32):
        mask = mask.float()
    mask = mask.expand(*mask.shape[:-1], x.shape[-1]) if mask.dim() else mask.expand(x.shape[-1])
    if mask.stride(-1) != 1 and x.shape[-1] != 1:
        mask = mask.contiguous()
    kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE if mask.dtype == x.dtype else ADDITIVE_FLOAT32
    whole = mask.expand(x.shape)
    dims = merged_dims(whole)
    if len(dims) > 3:
        whole = whole.contiguous()
        dims = merged_dims(whole)
    sizes, strides = zip(*[(1, 0)] * (3 - len(dims)), *dims, (x.shape[-1], 1), strict=True)
    return whole.as_strided(sizes, strides), kind


def softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str, y: Tensor) -> None:
    KERNELS[backend].softmax_forward(as_rows(x), *as_mask(mask, x), scale, causal, y, *place(x))


def softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool, backend: str, dx: Tensor) -> None:
    KERNELS[backend].softmax_backward(as_rows(dy), as_rows(y), scale, causal, dx, *place(y))


def cross_entropy_forward(
    logits: Tensor,
    targets: Targets,
    options: Options,
    backend: str,
    loss: Tensor,
    lse: Tensor,
    entropy: Tensor | None = None,
) -> None:
    KERNELS[backend].cross_entropy_forward(as_rows(logits), *targets, options, loss, lse, entropy, *place(logits))


def cross_entropy_backward(
    logits: Tensor, targets: Targets, lse: Tensor, upstream: Upstream, options: Options, backend: str, dlogits: Tensor
) -> None:
    inputs = as_rows(logits), *targets, lse, *upstream
    KERNELS[backend].cross_entropy_backward(*inputs, options, dlogits, *place(logits))


def jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dloss: Tensor | None, divergence: Divergence, backend: str,
    loss: Tensor, dlogits: Tensor | None,
) -> None:  # fmt: skip
    KERNELS[backend].jsd(student, teacher, mask, dloss, divergence, loss, dlogits, *place(student))
