"""Softmax and cross-entropy in the native module: C++ on CPUs, CUDA C++ on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPE_CODES, KERNELS, as_rows, place, pointer
from .options import Options

NO_MASK = (0, 1, 1, 0, 0, 0, 0)
BOOLEAN, ADDITIVE, ADDITIVE_FLOAT32 = 1, 2, 3


def as_mask(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """``mask`` broadcast to ``x``, as csrc/softmax.h addresses it: ``(mask, (data, middle, inner, 3 strides, kind))``.

    The mask that comes back must be kept alive. Dimensions that are broadcast stay so, without a copy, but
    for the last one, and where the rest needs more than three strides.
    """
    if mask is None:
        return None, NO_MASK
    if mask.is_floating_point() and mask.dtype not in (x.dtype, torch.float32):
        mask = mask.float()
    mask = mask.expand(*mask.shape[:-1], x.shape[-1]) if mask.dim() else mask.expand(x.shape[-1])
    if mask.stride(-1) != 1 and x.shape[-1] != 1:
        mask = mask.contiguous()
    kind = BOOLEAN if mask.dtype == torch.bool else ADDITIVE if mask.dtype == x.dtype else ADDITIVE_FLOAT32
    levels: list[list[int]] = []  # [size, stride], outermost first
    whole = mask.expand(x.shape)
    for size, stride in zip(whole.shape[:-1], whole.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if len(levels) > 3:
        return as_mask(whole.contiguous(), x)
    (_, outer), (middle, middle_stride), (inner, inner_stride) = [[1, 0]] * (3 - len(levels)) + levels
    return mask, (mask.data_ptr(), middle, inner, outer, middle_stride, inner_stride, kind)


def softmax_forward(x: Tensor, mask: Tensor | None, y: Tensor, scale: float, causal: bool, backend: str) -> None:
    x, x_rows = as_rows(x)
    mask, mask_rows = as_mask(mask, x)
    cols = x.shape[-1]
    KERNELS[backend].softmax_forward(
        x_rows, mask_rows, y.data_ptr(), x.numel() // max(1, cols), cols, x.shape[-2] if causal else 0, scale,
        DTYPE_CODES[x.dtype], *place(x),
    )  # fmt: skip


def softmax_backward(dy: Tensor, y: Tensor, dx: Tensor, scale: float, causal: bool, backend: str) -> None:
    dy, dy_rows = as_rows(dy)
    y, y_rows = as_rows(y)
    cols = y.shape[-1]
    KERNELS[backend].softmax_backward(
        dy_rows, y_rows, dx.data_ptr(), y.numel() // max(1, cols), cols, y.shape[-2] if causal else 0, scale,
        DTYPE_CODES[y.dtype], *place(y),
    )  # fmt: skip


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    mean_weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    options: Options,
    backend: str,
) -> None:
    logits, logits_rows = as_rows(logits)
    KERNELS[backend].cross_entropy_forward(
        logits_rows, target.data_ptr(), pointer(class_weight), pointer(mean_weight), loss.data_ptr(), lse.data_ptr(),
        target.numel(), logits.shape[-1], *options, DTYPE_CODES[logits.dtype], *place(logits),
    )  # fmt: skip


def cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    mean_weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlse: Tensor | None,
    dlogits: Tensor,
    options: Options,
    backend: str,
) -> None:
    logits, logits_rows = as_rows(logits)
    KERNELS[backend].cross_entropy_backward(
        logits_rows, target.data_ptr(), pointer(class_weight), pointer(mean_weight), lse.data_ptr(), pointer(dloss),
        0 if dloss is None else dloss.stride(0), pointer(dlse), dlogits.data_ptr(),
        target.numel(), logits.shape[-1], *options, DTYPE_CODES[logits.dtype], *place(logits),
    )  # fmt: skip
