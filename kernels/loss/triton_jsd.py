"""The Triton kernel of the Jensen-Shannon divergence of two models' logits (csrc/jsd.h has the formulas).

Memory-bound. A program walks along a row of both models three times: for their log-sum-exps, for the loss, and for the
gradient, but that of the forward KL, which is written with the loss.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, multiple, power_of_two
from .options import Divergence

LONGEST = 1024  # columns of a program's tile: more of the logarithms at a time would spill


@triton.jit
def _expm1_near(x):
    """e^x - 1 for abs(x) up to log(2) / 2, by csrc/cpu/simd.h's polynomial."""
    p = 1.9875691500e-4 * x + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    p = p * x + 5.0000001201e-1
    return p * x * x + x


@triton.jit
def _log1p_near(x):
    """log(1 + x) for x in [sqrt(1/2) - 1, sqrt(2) - 1], after Cephes."""
    p = 7.0376836292e-2 * x - 1.1514610310e-1
    p = p * x + 1.1676998740e-1
    p = p * x - 1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x - 1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x - 2.4999993993e-1
    p = p * x + 3.3333331174e-1
    return p * x * (x * x) - 0.5 * (x * x) + x


@triton.jit
def _log_below(x, less):
    """log x of positive normal numbers up to 1, of which ``less`` is x - 1 with all its digits."""
    near = less > -0.29
    bits = x.to(tl.int32, bitcast=True) + 0x4AFB0D  # the exponent grows from sqrt(1/2) on
    fraction = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    n = tl.where(near, 0.0, ((bits >> 23) - 127).to(tl.float32))
    return _log1p_near(tl.where(near, less, fraction - 1.0)) - n * 2.12194440e-4 + n * 0.693359375


@triton.jit
def _ratios(d, teacher_share, student_share):
    """log(q / m) and log(p / m), by d = log(p / q)."""
    below = d <= 0.0
    u = tl.where(below, d, -d)
    smaller = tl.where(below, teacher_share, student_share)
    larger = tl.where(below, student_share, teacher_share)
    e = tl.exp(u)
    less = smaller * tl.where(u > -0.34, _expm1_near(u), e - 1.0)
    r = _log_below(larger + smaller * e, less)
    return tl.where(below, -r, -d - r), tl.where(below, d - r, -r)


@triton.jit
def _weighted(probability, logarithm):
    """0 times infinity is 0 here."""
    return tl.where(probability == 0.0, 0.0, probability * logarithm)


@triton.jit
def _scores(LOGITS, offsets, cols, scale):
    """Beyond the row's end -inf."""
    return tl.load(LOGITS + offsets, offsets < cols, other=float("-inf")).to(tl.float32) * scale


@triton.jit
def _add(row_max, row_sum, s):
    """A block of scores, in the sum of exponentials of a row."""
    next_max = tl.maximum(row_max, tl.max(s, 0))
    shift = tl.where(next_max == float("-inf"), 0.0, next_max)
    return next_max, row_sum * tl.exp(row_max - shift) + tl.exp(s - shift)


@Kernel
def jsd_kernel(
    STUDENT, TEACHER, MASK, DLOSS, LOSS, DLOGITS,
    cols, dloss_stride, teacher_share, student_share, scale,
    ALIGNED: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes a row. It reads a block before it writes it: DLOGITS may be STUDENT."""
    cols = multiple(cols, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    student, teacher = STUDENT + row * cols, TEACHER + row * cols
    end = cols  # of what is read: nothing of a row that does not count
    if MASK is not None:
        end = tl.where(tl.load(MASK + row) != 0, cols, 0)
    dscore = 0.0
    if DLOSS is not None:
        dscore = tl.where(end > 0, tl.load(DLOSS + row * dloss_stride) * scale, 0.0)

    q_max, p_max = tl.full([1], float("-inf"), tl.float32), tl.full([1], float("-inf"), tl.float32)
    q_sum, p_sum = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for start in tl.range(0, end, COLS):
        offsets = start + tl.arange(0, COLS)
        q_max, q_sum = _add(q_max, q_sum, _scores(student, offsets, end, scale))
        p_max, p_sum = _add(p_max, p_sum, _scores(teacher, offsets, end, scale))
    q_log, p_log = tl.log(tl.sum(q_sum, 0)), tl.log(tl.sum(p_sum, 0))

    of_student, of_teacher = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for start in tl.range(0, end, COLS):
        offsets = start + tl.arange(0, COLS)
        log_q = _scores(student, offsets, end, scale) - q_max - q_log
        log_p = _scores(teacher, offsets, end, scale) - p_max - p_log
        q, p = tl.exp(log_q), tl.exp(log_p)
        if FORWARD:
            of_teacher += _weighted(p, log_p - log_q)
            if DLOSS is not None:
                gradient = tl.where(dscore != 0.0, (q - p) * dscore, 0.0)
                tl.store(DLOGITS + row * cols + offsets, gradient.to(DLOGITS.dtype.element_ty), offsets < end)
        elif REVERSE:
            of_student += _weighted(q, log_q - log_p)
        else:
            by_student, by_teacher = _ratios(log_p - log_q, teacher_share, student_share)
            of_student += _weighted(q, by_student)
            of_teacher += _weighted(p, by_teacher)
    k, loss = tl.sum(of_student, 0), tl.sum(of_teacher, 0)
    if REVERSE:
        loss = k
    elif not FORWARD:
        loss = teacher_share * loss + student_share * k
    tl.store(LOSS + row, loss)

    if DLOSS is not None:
        if not FORWARD:
            if not REVERSE:
                dscore *= student_share
            for start in tl.range(0, end, COLS):
                offsets = start + tl.arange(0, COLS)
                log_q = _scores(student, offsets, end, scale) - q_max - q_log
                ratio = log_q - (_scores(teacher, offsets, end, scale) - p_max - p_log)
                if not REVERSE:
                    ratio, _ = _ratios(-ratio, teacher_share, student_share)
                gradient = tl.where(dscore != 0.0, _weighted(tl.exp(log_q), ratio - k) * dscore, 0.0)
                tl.store(DLOGITS + row * cols + offsets, gradient.to(DLOGITS.dtype.element_ty), offsets < end)
        for start in tl.range(end, cols, COLS):  # a row that does not count
            offsets = start + tl.arange(0, COLS)
            zeros = tl.zeros([COLS], DLOGITS.dtype.element_ty)
            tl.store(DLOGITS + row * cols + offsets, zeros, offsets < cols)


@functools.lru_cache(maxsize=1024)
def _block(cols: int) -> tuple[int, int]:
    """Columns of a program's tile, and warps."""
    block = min(LONGEST, power_of_two(cols))
    return block, min(8, max(1, block // 256))


def jsd(
    student: Tensor, teacher: Tensor, mask: Tensor | None, dloss: Tensor | None, divergence: Divergence, backend: str,
    loss: Tensor, dlogits: Tensor | None,
) -> None:  # fmt: skip
    rows, cols = student.shape
    teacher_share, student_share, scale = divergence
    block, warps = _block(cols)
    jsd_kernel(
        (rows, 1, 1),
        (student, teacher, None if mask is None else mask.view(torch.uint8), dloss, loss, dlogits),
        (cols, 0 if dloss is None else dloss.stride(0), teacher_share, student_share, scale),
        (cols % 8 == 0, teacher_share == 0, student_share == 0, block),
        warps,
    )
