"""Softmax and cross-entropy in Triton (csrc/softmax.h and csrc/cross_entropy.h give the formulas).

Memory-bound. The floor is one read and one write of the tensor for softmax forward, two reads and one write
backward; one read of the logits for cross-entropy forward, one read and one write backward. Softmax holds whole
rows in registers; a row too long for that goes through a loop that keeps maximum and sum up to date, and is read
twice. Cross-entropy always takes that loop, forward; its backward is elementwise.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import (
    LOOP_COLS,
    Kernel,
    cdiv,
    multiple,
    power_of_two,
    row_offsets,
    rows_at,
    tanh,
    tile,
)
from .native import BOOLEAN, as_mask
from .options import Options, Targets, Upstream
from .triton_jsd import jsd as jsd  # a launcher, as those below

# The longest row that a program holds: one value a column forward, two backward.
LONGEST_FORWARD, LONGEST_BACKWARD = 16384, 8192

# ---- softmax ----


@triton.jit
def _visible(row, cols, queries):
    """How many columns a row of a causal softmax sees."""
    return tl.maximum(row % queries + cols - queries + 1, 0).to(tl.int32)


@triton.jit
def _columns(offsets, inside, end, CAUSAL: tl.constexpr):
    """(what is loaded, what is seen) of the columns ``offsets``.

    Causal loads end at a multiple of 16: a mask that may end anywhere makes them single elements.
    """
    read, seen = inside, inside
    if CAUSAL:
        read, seen = inside & (offsets < (end + 15) // 16 * 16), inside & (offsets < end)
    return read, seen


@triton.jit
def _mask_offsets(row, middle, inner, outer_stride, middle_stride, inner_stride, ALIGNED: tl.constexpr):
    group = row // inner
    outer, inner_offsets = row_offsets(group, middle, outer_stride, middle_stride, ALIGNED, True), row % inner
    return outer + inner_offsets * multiple(inner_stride, ALIGNED)


@triton.jit
def _scores(X, MASK, x_offsets, mask_offsets, read, seen, scale, KIND: tl.constexpr):
    """x * scale under the mask, -inf where nothing is seen. KIND is csrc/softmax.h's MaskKind."""
    s = tl.load(X + x_offsets, read, other=0.0).to(tl.float32) * scale
    if KIND == 1:
        seen = seen & (tl.load(MASK + mask_offsets, read, other=0) != 0)
    elif KIND > 1:
        s += tl.load(MASK + mask_offsets, read, other=0.0).to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _shift(row_max):
    """What is subtracted before exp: the maximum, but 0 where that is -inf, from which nothing can be taken."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@Kernel
def softmax_forward_kernel(
    X, MASK, Y,
    rows, cols, queries, x_inner, x_outer, x_step,
    m_middle, m_inner, m_outer, m_middle_step, m_step, scale,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, LOOP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows)[:, None]
    end = cols
    if CAUSAL:
        end = _visible(row, cols, queries)[:, None]
    x_row = row_offsets(row, x_inner, x_outer, x_step, ALIGNED, NESTED)[:, None]
    m_row = _mask_offsets(row, m_middle, m_inner, m_outer, m_middle_step, m_step, ALIGNED)[:, None]
    y_row = (row * cols)[:, None]
    if LOOP:
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, tl.max(end) if CAUSAL else cols, COLS):
            offsets = start + col
            read, seen = _columns(offsets, inside & (offsets < cols), end, CAUSAL)
            s = _scores(X, MASK, x_row + offsets, m_row + offsets, read, seen, scale, KIND)
            next_max = tl.maximum(row_max, tl.max(s, 1))
            shift = _shift(next_max)[:, None]
            row_sum = row_sum * tl.exp(row_max[:, None] - shift) + tl.exp(s - shift)
            row_max = next_max
        shift, row_sum = _shift(row_max)[:, None], tl.sum(row_sum, 1)[:, None]
        divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
        for start in range(0, cols, COLS):
            offsets = start + col
            read, seen = _columns(offsets, inside & (offsets < cols), end, CAUSAL)
            s = _scores(X, MASK, x_row + offsets, m_row + offsets, read, seen, scale, KIND)
            y = (tl.exp(s - shift) / divisor).to(Y.dtype.element_ty)
            tl.store(Y + y_row + offsets, y, inside & (offsets < cols))
    else:
        read, seen = _columns(col, inside & (col < cols), end, CAUSAL)
        s = _scores(X, MASK, x_row + col, m_row + col, read, seen, scale, KIND)
        e = tl.exp(s - _shift(tl.max(s, 1))[:, None])
        row_sum = tl.sum(e, 1)[:, None]
        y = e / tl.where(row_sum == 0.0, 1.0, row_sum)
        tl.store(Y + y_row + col, y.to(Y.dtype.element_ty), inside & (col < cols))


@triton.jit
def _pair(dy_row, y_row, offsets, inside, end, CAUSAL: tl.constexpr):
    """(dy, y) of some columns, 0 where they are not seen."""
    read, seen = _columns(offsets, inside, end, CAUSAL)
    dy = tl.load(dy_row + offsets, read, other=0.0).to(tl.float32)
    y = tl.load(y_row + offsets, read, other=0.0).to(tl.float32)
    return tl.where(seen, dy, 0.0), tl.where(seen, y, 0.0)


@Kernel
def softmax_backward_kernel(
    DY, Y, DX,
    rows, cols, queries, dy_inner, dy_outer, dy_step, y_inner, y_outer, y_step, scale,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, CAUSAL: tl.constexpr, LOOP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows)[:, None]
    end = cols
    if CAUSAL:
        end = _visible(row, cols, queries)[:, None]
    dy_row = DY + row_offsets(row, dy_inner, dy_outer, dy_step, ALIGNED, NESTED)[:, None]
    y_row = Y + row_offsets(row, y_inner, y_outer, y_step, ALIGNED, NESTED)[:, None]
    dx_row = DX + (row * cols)[:, None]
    if LOOP:
        products = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, tl.max(end) if CAUSAL else cols, COLS):
            offsets = start + col
            dy, y = _pair(dy_row, y_row, offsets, inside & (offsets < cols), end, CAUSAL)
            products += dy * y
        dot = tl.sum(products, 1)[:, None]
        for start in range(0, cols, COLS):
            offsets = start + col
            dy, y = _pair(dy_row, y_row, offsets, inside & (offsets < cols), end, CAUSAL)
            tl.store(dx_row + offsets, (y * (dy - dot) * scale).to(DX.dtype.element_ty), inside & (offsets < cols))
    else:
        dy, y = _pair(dy_row, y_row, col, inside & (col < cols), end, CAUSAL)
        dx = y * (dy - tl.sum(dy * y, 1)[:, None]) * scale
        tl.store(dx_row + col, dx.to(DX.dtype.element_ty), inside & (col < cols))


def softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str, y: Tensor) -> None:
    cols, queries = x.shape[-1], x.shape[-2] if causal else 0
    rows = x.numel() // cols
    mask, kind = as_mask(mask, x)
    sizes, strides = ((1, 1, 1), (0, 0, 0)) if mask is None else (mask.shape, mask.stride()[:3])
    x = as_rows(x)
    at, *layout = rows_at(x, sizes=(cols, *strides))
    tile_rows, tile_cols, warps = tile(cols, LONGEST_FORWARD)
    softmax_forward_kernel(
        (cdiv(rows, tile_rows), 1, 1),
        (x, mask.view(torch.uint8) if mask is not None and kind == BOOLEAN else mask, y),
        (rows, cols, queries, *at, sizes[1], sizes[2], *strides, scale),
        (*layout, kind, causal, cols > tile_cols, tile_rows, tile_cols),
        warps,
    )


def softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool, backend: str, dx: Tensor) -> None:
    cols, queries = y.shape[-1], y.shape[-2] if causal else 0
    rows = y.numel() // cols
    dy, y = as_rows(dy), as_rows(y)
    at, *layout = rows_at(dy, y, sizes=(cols,))
    tile_rows, tile_cols, warps = tile(cols, LONGEST_BACKWARD)
    softmax_backward_kernel(
        (cdiv(rows, tile_rows), 1, 1),
        (dy, y, dx),
        (rows, cols, queries, *at, scale),
        (*layout, causal, cols > tile_cols, tile_rows, tile_cols),
        warps,
    )


# ---- cross-entropy ----


@triton.jit
def _bounded(log):
    """A logarithm to multiply its exponential with: below -200 that is 0, and 0 * -inf would be NaN."""
    return tl.maximum(log, -200.0)


@triton.jit
def _scored(logit, softcap, scale, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """The score, and its derivative with respect to the logit but for the scale."""
    slope = 1.0
    if CAPPED:
        t = tanh(logit / softcap)
        logit, slope = softcap * t, 1.0 - t * t
    if SCALED:
        logit *= scale
    return logit, slope


@triton.jit
def _target(TARGET, WEIGHT, MEAN, row, cols, ignore_index, label_smoothing, first_class, classes):
    """Of a row: (ignored, the target's column or -1, (1 - e) * w_t, that + e * mean weight)."""
    t = tl.load(TARGET + row)
    ignored = t == ignore_index
    valid = (t >= 0) & (t < classes) & (t != ignore_index)
    col = tl.where(valid & (t >= first_class) & (t < first_class + cols), t - first_class, -1)
    target_weight, mean = 1.0 - label_smoothing, 1.0
    if WEIGHT is not None:
        target_weight *= tl.load(WEIGHT + tl.where(valid, t, 0))
        mean = tl.load(MEAN)
    target_weight = tl.where(valid, target_weight, float("nan"))  # out of range
    return ignored, col, target_weight, target_weight + label_smoothing * mean


@Kernel
def cross_entropy_forward_kernel(
    LOGITS, TARGET, WEIGHT, MEAN, LOSS, LSE, ENTROPY,
    cols, logits_inner, logits_outer, logits_step,
    ignore_index: tl.int64, label_smoothing, z_loss, softcap, scale, first_class, classes,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    WHOLE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row_offsets(row, logits_inner, logits_outer, logits_step, ALIGNED, NESTED)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([COLS], tl.float32)
    weighted_sum = tl.zeros([COLS], tl.float32)
    moment = tl.zeros([COLS], tl.float32)  # sum of exp(s - shift) * (s - shift)
    for start in tl.range(0, cols, COLS, num_stages=2):  # the next block is on its way
        offsets = start + tl.arange(0, COLS)
        logit = tl.load(logits + offsets, offsets < cols, other=0.0).to(tl.float32)
        s, _ = _scored(logit, softcap, scale, CAPPED, SCALED)
        if SMOOTHED:
            weighted = s
            if WEIGHT is not None:
                weighted = s * tl.load(WEIGHT + multiple(first_class, ALIGNED) + offsets, offsets < cols, other=0.0)
            weighted_sum += tl.where(offsets < cols, weighted, 0.0)
        s = tl.where(offsets < cols, s, float("-inf"))
        next_max = tl.maximum(row_max, tl.max(s, 0))
        shift = _shift(next_max)
        by, e = tl.exp(row_max - shift), tl.exp(s - shift)
        if ENTROPY is not None:
            moment = (moment + row_sum * _bounded(row_max - shift)) * by + e * _bounded(s - shift)
        row_sum = row_sum * by + e
        row_max = next_max
    row_sum = tl.sum(row_sum)
    lse = tl.sum(_shift(row_max)) + tl.log(row_sum)

    ignored, col, target_weight, total_weight = _target(
        TARGET, WEIGHT, MEAN, row, cols, ignore_index, label_smoothing, first_class, classes
    )
    target_logit = tl.load(logits + col, col >= 0, other=0.0).to(tl.float32)
    target_score, _ = _scored(target_logit, softcap, scale, CAPPED, SCALED)
    loss = target_weight * tl.where(col >= 0, target_score, 0.0)
    if SMOOTHED:
        loss += label_smoothing / classes * tl.sum(weighted_sum)
    if WHOLE:
        loss = total_weight * lse - loss + z_loss * lse * lse
    tl.store(LOSS + row, tl.where(ignored, 0.0, loss))
    tl.store(LSE + row, lse)
    if ENTROPY is not None:
        tl.store(ENTROPY + row, tl.where(ignored, 0.0, tl.log(row_sum) - tl.sum(moment) / row_sum))


@Kernel
def cross_entropy_backward_kernel(
    LOGITS, TARGET, WEIGHT, MEAN, LSE, DLOSS, DLSE, DENTROPY, ENTROPY, DLOGITS,
    cols, logits_inner, logits_outer, logits_step, dloss_stride,
    ignore_index: tl.int64, label_smoothing, z_loss, softcap, scale, first_class, classes,
    ALIGNED: tl.constexpr, NESTED: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """A program takes a block of a row. It reads the block before it writes it: DLOGITS may be LOGITS."""
    cols = multiple(cols, ALIGNED)
    blocks = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    ignored, col, target_weight, total_weight = _target(
        TARGET, WEIGHT, MEAN, row, cols, ignore_index, label_smoothing, first_class, classes
    )
    lse = tl.load(LSE + row)
    # dlse: the whole gradient of the log-sum-exp, also through the loss and the entropy
    dlse, dloss, dentropy = 0.0, 0.0, 0.0
    if DLOSS is not None:
        dloss = tl.where(ignored, 0.0, tl.load(DLOSS + row * dloss_stride))
        dlse = tl.where(ignored, 0.0, dloss * (total_weight + 2.0 * z_loss * lse))
    if DLSE is not None:
        dlse += tl.load(DLSE + row)
    if DENTROPY is not None:
        dentropy = tl.where(ignored, 0.0, tl.load(DENTROPY + row))
        dlse -= tl.where(ignored, 0.0, dentropy * tl.load(ENTROPY + row))
    active = (dlse != 0.0) | (dloss != 0.0) | (dentropy != 0.0)  # else 0, whatever the logits hold
    if SCALED:
        dlse, dloss, dentropy = dlse * scale, dloss * scale, dentropy * scale
    logits = LOGITS + row_offsets(row, logits_inner, logits_outer, logits_step, ALIGNED, NESTED)
    logit = tl.load(logits + offsets, offsets < tl.where(active, cols, 0), other=0.0).to(tl.float32)
    score, slope = _scored(logit, softcap, scale, CAPPED, SCALED)
    log_p = score - lse
    if DENTROPY is not None:
        dlse -= dentropy * _bounded(log_p)
    gradient = tl.exp(log_p) * dlse - tl.where(offsets == col, dloss * target_weight, 0.0)
    if SMOOTHED:
        smooth = dloss * label_smoothing / classes
        if WEIGHT is not None:
            smooth = smooth * tl.load(WEIGHT + multiple(first_class, ALIGNED) + offsets, offsets < cols, other=0.0)
        gradient -= smooth
    gradient = tl.where(active, gradient * slope, 0.0)
    tl.store(DLOGITS + row * cols + offsets, gradient.to(DLOGITS.dtype.element_ty), offsets < cols)


@functools.lru_cache(maxsize=1024)
def _block(cols: int) -> tuple[int, int]:
    """Columns of a program's tile, and warps."""
    block = min(LOOP_COLS, power_of_two(cols))  # a shard may have no column
    return block, min(8, max(1, block // 512))


def cross_entropy_forward(
    logits: Tensor,
    targets: Targets,
    options: Options,
    backend: str,
    loss: Tensor,
    lse: Tensor,
    entropy: Tensor | None = None,
) -> None:
    logits = as_rows(logits)
    cols = logits.shape[-1]
    at, *layout = rows_at(logits, sizes=(cols, options.first_class))
    block, warps = _block(cols)
    cross_entropy_forward_kernel(
        (loss.numel(), 1, 1),
        (logits, *targets, loss, lse, entropy),
        (cols, *at, *options),
        (
            *layout,
            options.label_smoothing != 0,
            options.softcap != 0,
            options.scale != 1,
            cols == options.classes,
            block,
        ),
        warps,
    )


def cross_entropy_backward(
    logits: Tensor, targets: Targets, lse: Tensor, upstream: Upstream, options: Options, backend: str, dlogits: Tensor
) -> None:
    logits = as_rows(logits)
    cols = logits.shape[-1]
    at, *layout = rows_at(logits, sizes=(cols, options.first_class))
    block, warps = _block(cols)
    cross_entropy_backward_kernel(
        (lse.numel() * cdiv(cols, block), 1, 1),
        (logits, *targets, lse, *upstream, dlogits),
        (cols, *at, 0 if upstream.dloss is None else upstream.dloss.stride(0), *options),
        (*layout, options.label_smoothing != 0, options.softcap != 0, options.scale != 1, block),
        warps,
    )
