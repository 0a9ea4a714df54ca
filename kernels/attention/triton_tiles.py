"""What the attention kernels in Triton share: tiles, the stages of a loop, scores, and their launchers' numbers.

Logits are in base 2. A program's blocks come in three stages, of which only the outer two compare
positions: the window's lower edge, blocks that are visible throughout, and the diagonal or the end.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import tanh

L2_BYTES = 2**24  # keys and values that programs running at once share in the L2 cache
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
NOT_SPECIALIZED = ["seq_q", "seq_k", "blocks", "total", "section", "window"]


@triton.jit
def work_of(blocks, total, section):
    """(block, sequence and head): all blocks of ``section`` heads before the next heads, block by block."""
    pid = tl.program_id(0)
    start = pid // (section * blocks) * section
    width = tl.minimum(section, total - start)
    within = pid - start * blocks
    return within // width, start + within % width


@triton.jit
def document(CU, index, seq):
    """First token in packed tokens, and length."""
    first, length = tl.full([], 0, tl.int64), seq
    if CU is not None:
        first = tl.load(CU + index).to(tl.int64)
        length = (tl.load(CU + index + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def load_rows(X, first, stride, end, BOUNDED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] from row ``first``; rows past the end are 0."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    at = X + tl.cast(first, tl.int64) * stride + (row.to(tl.int64) * stride)[:, None] + col
    inside = (row < end - first)[:, None]
    if BOUNDED:
        tile = tl.load(at, inside & (col < DIM), other=0.0)
    elif DIM < COLS:
        tile = tl.load(at, col < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(X, tile, first, stride, end, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    at = X + tl.cast(first, tl.int64) * stride + (row.to(tl.int64) * stride)[:, None] + col
    tl.store(at, tile.to(X.dtype.element_ty), (row < end - first)[:, None] & (col < DIM))


@triton.jit
def stages(first, last, full_first, full_last, BLOCK: tl.constexpr):
    """Bounds of the three stages: what is visible, and what of it is visible throughout; ends excluded."""
    begin = tl.maximum(first, 0) // BLOCK * BLOCK
    end = tl.maximum(last, begin)
    full = tl.minimum(tl.cdiv(tl.maximum(full_first, begin), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    edge = tl.maximum(tl.maximum(full_last, 0) // BLOCK * BLOCK, full)
    return begin, full, edge, end


@triton.jit
def key_stages(low, high, seq_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Stages over the keys that queries at positions low to high see."""
    first, last, full_first, full_last = 0, seq_k, 0, seq_k
    if CAUSAL:
        last, full_last = high + 1, low + 1
    if WINDOW:
        first, full_first = low - window + 1, high - window + 1
    return stages(first, last, full_first, full_last, BLOCK)


@triton.jit
def visible(position, key, seq_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = key <= position if CAUSAL else key < seq_k
    if WINDOW:
        seen &= key > position - window
    return seen


@triton.jit
def logits(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2. Without softcap the scale has log2(e) in it; with it the softcap has."""
    s = tl.dot(a, b, input_precision="ieee") * scale
    if SOFTCAP:
        s = softcap * tanh(s, a.dtype == tl.float32)
    return s


def strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Of the batch, the tokens and the heads."""
    return (0, x.stride(0), x.stride(1)) if packed else x.stride()[:3]


def scales(scale: float, softcap: float) -> tuple[float, float]:
    """See ``logits``."""
    return (scale / softcap, softcap * LOG2E.value) if softcap else (scale * LOG2E.value, 0.0)


def section(seq: int, bytes_per_token: int, group: int, total: int) -> int:
    """How many heads to work on at once, see ``work_of``."""
    return min(total, group * max(1, L2_BYTES // max(1, seq * bytes_per_token)))


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def shape_class(*sizes: int | bool) -> str:
    """Shapes that share a tuned configuration: sizes to the next power of two."""
    return " ".join(str(triton.next_power_of_2(n)) if isinstance(n, int) and n > 1 else str(int(n)) for n in sizes)
