"""Softmax and cross-entropy in Triton (csrc/softmax.h and csrc/cross_entropy.h give the formulas).

Memory-bound. The floor is one read and one write of the tensor for softmax forward, two reads and one write
backward; one read of the logits for cross-entropy forward, one read and one write backward. Softmax holds whole
rows in registers; a row too long for that goes through a loop that keeps maximum and sum up to date, and is read
twice. Cross-entropy always takes that loop, forward; its backward is elementwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import as_rows
from ..triton_launch import LOOP_COLS, on_device, row_offsets, row_strides, tanh, tile
from .native import BOOLEAN, as_mask
from .options import Options

# The longest row that a program holds: one value a column forward, two backward.
LONGEST_FORWARD, LONGEST_BACKWARD = 16384, 8192

# ---- softmax ----


@triton.jit
def _visible(row, cols, queries):
    """How many columns a row of a causal softmax sees."""
    return tl.maximum(row % queries + cols - queries + 1, 0).to(tl.int32)


@triton.jit
def _columns(at, inside, end, CAUSAL: tl.constexpr):
    """(what is loaded, what is seen) of the columns ``at``.

    Causal loads go on to a multiple of 16: a mask that may end anywhere makes them single elements.
    """
    read, seen = inside, inside
    if CAUSAL:
        read, seen = inside & (at < (end + 15) // 16 * 16), inside & (at < end)
    return read, seen


@triton.jit
def _mask_offsets(row, middle, inner, outer_stride, middle_stride, inner_stride):
    group = row // inner
    return group // middle * outer_stride + group % middle * middle_stride + row % inner * inner_stride


@triton.jit
def _scores(X, MASK, x_at, mask_at, read, seen, scale, KIND: tl.constexpr):
    """x * scale under the mask, -inf where nothing is seen. KIND is csrc/softmax.h's MaskKind."""
    s = tl.load(X + x_at, read, other=0.0).to(tl.float32) * scale
    if KIND == 1:
        seen = seen & (tl.load(MASK + mask_at, read, other=0) != 0)
    elif KIND > 1:
        s += tl.load(MASK + mask_at, read, other=0.0).to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _shift(top):
    """What is subtracted before exp: the maximum, but 0 where that is -inf, from which nothing can be taken."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_forward_kernel(
    X, MASK, Y,
    rows, cols, queries, x_inner, x_outer, x_step,
    m_middle, m_inner, m_outer, m_middle_step, m_step, scale,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows)[:, None]
    end = cols
    if CAUSAL:
        end = _visible(row, cols, queries)[:, None]
    x_row = row_offsets(row, x_inner, x_outer, x_step)[:, None]
    m_row = _mask_offsets(row, m_middle, m_inner, m_outer, m_middle_step, m_step)[:, None]
    y_row = (row * cols)[:, None]
    if LOOP:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, tl.max(end) if CAUSAL else cols, COLS):
            at = start + col
            read, seen = _columns(at, inside & (at < cols), end, CAUSAL)
            s = _scores(X, MASK, x_row + at, m_row + at, read, seen, scale, KIND)
            next_top = tl.maximum(top, tl.max(s, 1))
            shift = _shift(next_top)[:, None]
            total = total * tl.exp(top[:, None] - shift) + tl.exp(s - shift)
            top = next_top
        shift, total = _shift(top)[:, None], tl.sum(total, 1)[:, None]
        divisor = tl.where(total == 0.0, 1.0, total)
        for start in range(0, cols, COLS):
            at = start + col
            read, seen = _columns(at, inside & (at < cols), end, CAUSAL)
            s = _scores(X, MASK, x_row + at, m_row + at, read, seen, scale, KIND)
            tl.store(Y + y_row + at, (tl.exp(s - shift) / divisor).to(Y.dtype.element_ty), inside & (at < cols))
    else:
        read, seen = _columns(col, inside & (col < cols), end, CAUSAL)
        s = _scores(X, MASK, x_row + col, m_row + col, read, seen, scale, KIND)
        e = tl.exp(s - _shift(tl.max(s, 1))[:, None])
        total = tl.sum(e, 1)[:, None]
        y = e / tl.where(total == 0.0, 1.0, total)
        tl.store(Y + y_row + col, y.to(Y.dtype.element_ty), inside & (col < cols))


@triton.jit
def _pair(dy_row, y_row, at, inside, end, CAUSAL: tl.constexpr):
    """(dy, y) at some columns, 0 where they are not seen."""
    read, seen = _columns(at, inside, end, CAUSAL)
    dy = tl.load(dy_row + at, read, other=0.0).to(tl.float32)
    y = tl.load(y_row + at, read, other=0.0).to(tl.float32)
    return tl.where(seen, dy, 0.0), tl.where(seen, y, 0.0)


@triton.jit
def softmax_backward_kernel(
    DY, Y, DX,
    rows, cols, queries, dy_inner, dy_outer, dy_step, y_inner, y_outer, y_step, scale,
    CAUSAL: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows)[:, None]
    end = cols
    if CAUSAL:
        end = _visible(row, cols, queries)[:, None]
    dy_row = DY + row_offsets(row, dy_inner, dy_outer, dy_step)[:, None]
    y_row = Y + row_offsets(row, y_inner, y_outer, y_step)[:, None]
    dx_row = DX + (row * cols)[:, None]
    if LOOP:
        products = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, tl.max(end) if CAUSAL else cols, COLS):
            at = start + col
            dy, y = _pair(dy_row, y_row, at, inside & (at < cols), end, CAUSAL)
            products += dy * y
        dot = tl.sum(products, 1)[:, None]
        for start in range(0, cols, COLS):
            at = start + col
            dy, y = _pair(dy_row, y_row, at, inside & (at < cols), end, CAUSAL)
            tl.store(dx_row + at, (y * (dy - dot) * scale).to(DX.dtype.element_ty), inside & (at < cols))
    else:
        dy, y = _pair(dy_row, y_row, col, inside & (col < cols), end, CAUSAL)
        dx = y * (dy - tl.sum(dy * y, 1)[:, None]) * scale
        tl.store(dx_row + col, dx.to(DX.dtype.element_ty), inside & (col < cols))


def softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str, y: Tensor) -> None:
    cols, queries = x.shape[-1], x.shape[-2] if causal else 0
    rows = x.numel() // cols
    mask, kind = as_mask(mask, x)
    m_sizes, m_strides = ((1, 1, 1), (0, 0, 0)) if mask is None else (mask.shape, mask.stride())
    x = as_rows(x)
    config = tile(cols, LONGEST_FORWARD)
    with on_device(x):
        softmax_forward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            X=x,
            MASK=mask.view(torch.uint8) if kind == BOOLEAN else mask,
            Y=y,
            rows=rows,
            cols=cols,
            queries=queries,
            m_middle=m_sizes[1],
            m_inner=m_sizes[2],
            m_outer=m_strides[0],
            m_middle_step=m_strides[1],
            m_step=m_strides[2],
            scale=scale,
            KIND=kind,
            CAUSAL=causal,
            LOOP=cols > config["COLS"],
            **row_strides(x=x),
            **config,
        )


def softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool, backend: str, dx: Tensor) -> None:
    cols, queries = y.shape[-1], y.shape[-2] if causal else 0
    rows = y.numel() // cols
    dy, y = as_rows(dy), as_rows(y)
    config = tile(cols, LONGEST_BACKWARD)
    with on_device(y):
        softmax_backward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            DY=dy,
            Y=y,
            DX=dx,
            rows=rows,
            cols=cols,
            queries=queries,
            scale=scale,
            CAUSAL=causal,
            LOOP=cols > config["COLS"],
            **row_strides(dy=dy, y=y),
            **config,
        )


# ---- cross-entropy ----


@triton.jit
def _capped(logit, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        logit = softcap * tanh(logit / softcap, True)
    return logit


@triton.jit
def _target(
    TARGET, WEIGHT, MEAN, row, cols, ignore_index, smoothing, first_class, classes, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """What the target of a row says: (ignored, its column or -1, (1 - e) * w_t, that + e * mean weight)."""
    t = tl.load(TARGET + row)
    ignored = t == ignore_index
    valid = (t >= 0) & (t < classes) & (t != ignore_index)
    col = tl.where(valid & (t >= first_class) & (t < first_class + cols), t - first_class, -1)
    own, mean = 1.0 - smoothing, 1.0
    if HAS_WEIGHT:
        own *= tl.load(WEIGHT + tl.where(valid, t, 0))
        mean = tl.load(MEAN)
    own = tl.where(valid, own, float("nan"))  # out of range
    return ignored, col, own, own + smoothing * mean


@triton.jit
def cross_entropy_forward_kernel(
    LOGITS, TARGET, WEIGHT, MEAN, LOSS, LSE,
    cols, inner, outer, step, ignore_index, smoothing, z_loss, softcap, first_class, classes,
    HAS_WEIGHT: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row_offsets(row, inner, outer, step)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    spread = tl.zeros([COLS], tl.float32)
    for start in range(0, cols, COLS):
        at = start + tl.arange(0, COLS)
        s = _capped(tl.load(logits + at, at < cols, other=0.0).to(tl.float32), softcap, CAPPED)
        if SMOOTHED:
            weighed = s
            if HAS_WEIGHT:
                weighed = s * tl.load(WEIGHT + first_class + at, at < cols, other=0.0)
            spread += tl.where(at < cols, weighed, 0.0)
        s = tl.where(at < cols, s, float("-inf"))
        next_top = tl.maximum(top, tl.max(s, 0))
        shift = _shift(next_top)
        total = total * tl.exp(top - shift) + tl.exp(s - shift)
        top = next_top
    lse = tl.sum(_shift(top)) + tl.log(tl.sum(total))

    ignored, col, own, all_in = _target(
        TARGET, WEIGHT, MEAN, row, cols, ignore_index, smoothing, first_class, classes, HAS_WEIGHT
    )
    at_target = _capped(tl.load(logits + col, col >= 0, other=0.0).to(tl.float32), softcap, CAPPED)
    loss = own * tl.where(col >= 0, at_target, 0.0)
    if SMOOTHED:
        loss += smoothing / classes * tl.sum(spread)
    if WHOLE:
        loss = all_in * lse - loss + z_loss * lse * lse
    tl.store(LOSS + row, tl.where(ignored, 0.0, loss))
    tl.store(LSE + row, lse)


@triton.jit
def cross_entropy_backward_kernel(
    LOGITS, TARGET, WEIGHT, MEAN, LSE, DLOSS, DLSE, DLOGITS,
    cols, inner, outer, step, dloss_stride, ignore_index, smoothing, z_loss, softcap, first_class, classes,
    HAS_WEIGHT: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    HAS_DLOSS: tl.constexpr, HAS_DLSE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes a block of a row. It reads the block before it writes it: DLOGITS may be LOGITS."""
    blocks = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    ignored, col, own, all_in = _target(
        TARGET, WEIGHT, MEAN, row, cols, ignore_index, smoothing, first_class, classes, HAS_WEIGHT
    )
    lse = tl.load(LSE + row)
    push, dloss = 0.0, 0.0
    if HAS_DLOSS:
        dloss = tl.where(ignored, 0.0, tl.load(DLOSS + row * dloss_stride))
        push = tl.where(ignored, 0.0, dloss * (all_in + 2.0 * z_loss * lse))
    if HAS_DLSE:
        push += tl.load(DLSE + row)
    pulled = (push != 0.0) | (dloss != 0.0)  # else 0, whatever the logits hold
    logits = LOGITS + row_offsets(row, inner, outer, step)
    logit = tl.load(logits + at, at < tl.where(pulled, cols, 0), other=0.0).to(tl.float32)
    slope = 1.0
    if CAPPED:
        t = tanh(logit / softcap, True)
        logit, slope = softcap * t, 1.0 - t * t
    gradient = tl.exp(logit - lse) * push - tl.where(at == col, dloss * own, 0.0)
    if SMOOTHED:
        pull = dloss * smoothing / classes
        if HAS_WEIGHT:
            pull = pull * tl.load(WEIGHT + first_class + at, at < cols, other=0.0)
        gradient -= pull
    gradient = tl.where(pulled, gradient * slope, 0.0)
    tl.store(DLOGITS + row * cols + at, gradient.to(DLOGITS.dtype.element_ty), at < cols)


def _block(cols: int) -> dict[str, int]:
    block = min(LOOP_COLS, triton.next_power_of_2(cols))
    return {"COLS": block, "num_warps": min(8, max(1, block // 512))}


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
    logits = as_rows(logits)
    cols, strides = logits.shape[-1], row_strides(x=logits).values()
    with on_device(logits):
        cross_entropy_forward_kernel[(target.numel(),)](
            logits, target, class_weight, mean_weight, loss, lse, cols, *strides, *options,
            HAS_WEIGHT=class_weight is not None, SMOOTHED=options.label_smoothing != 0, CAPPED=options.softcap != 0,
            WHOLE=cols == options.classes, **_block(cols),
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
    logits = as_rows(logits)
    strides = row_strides(x=logits).values()
    cols, config = logits.shape[-1], _block(logits.shape[-1])
    with on_device(logits):
        cross_entropy_backward_kernel[(target.numel() * triton.cdiv(cols, config["COLS"]),)](
            logits, target, class_weight, mean_weight, lse, dloss, dlse, dlogits, cols, *strides,
            0 if dloss is None else dloss.stride(0), *options,
            HAS_WEIGHT=class_weight is not None, SMOOTHED=options.label_smoothing != 0, CAPPED=options.softcap != 0,
            HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None, **config,
        )  # fmt: skip
