"""What the attention kernels in Triton share: tiles, the stages of a loop, scores, and their launchers' numbers.

Logits are in base 2. A program's blocks come in three stages, of which only the outer two compare
positions: the window's lower edge, blocks that are visible throughout, and the diagonal or the end.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import multiple, power_of_two, tanh
from .options import UNBOUNDED, Options
from .packing import Packing, longest

L2_BYTES = 2**24  # keys and values that programs running at once share in the L2 cache
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def tile_indices(blocks, items, group_size):
    """(block, item), an item being a head of a sequence: all blocks of ``group_size`` items before the next items,
    block by block."""
    pid = tl.program_id(0)
    start = pid // (group_size * blocks) * group_size
    width = tl.minimum(group_size, items - start)
    within = pid - start * blocks
    return within // width, start + within % width


@triton.jit
def sequence(CU, index, seq):
    """First token in packed tokens, and length."""
    first, length = tl.full([], 0, tl.int64), seq
    if CU is not None:
        first = tl.load(CU + index).to(tl.int64)
        length = (tl.load(CU + index + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def start_of(X, batch, first, head, batch_stride, seq_stride, head_stride, ALIGNED: tl.constexpr):
    """Where the rows of a head begin, those of a sequence or of the packed tokens from ``first``."""
    X += batch * multiple(batch_stride, ALIGNED) + first * multiple(seq_stride, ALIGNED)
    return X + head.to(tl.int64) * multiple(head_stride, ALIGNED)


@triton.jit
def first_row(CU, batch, first, seq):
    """The row of a sequence's first token in a contiguous tensor."""
    row = first
    if CU is None:
        row = batch * seq
    return row


@triton.jit
def load_rows(X, first, stride, end, BOUNDED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] from row ``first``; rows past the end are 0."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    offsets = X + tl.cast(first, tl.int64) * stride + (row.to(tl.int64) * stride)[:, None] + col
    inside = (row < end - first)[:, None]
    if BOUNDED:
        tile = tl.load(offsets, inside & (col < DIM), other=0.0)
    elif DIM < COLS:
        tile = tl.load(offsets, col < DIM, other=0.0)
    else:
        tile = tl.load(offsets)
    return tile


@triton.jit
def store_rows(X, tile, first, stride, end, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    offsets = X + tl.cast(first, tl.int64) * stride + (row.to(tl.int64) * stride)[:, None] + col
    tl.store(offsets, tile.to(X.dtype.element_ty), (row < end - first)[:, None] & (col < DIM))


@triton.jit
def store_missed(X, first, stride, end, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """NaN in the rows that no program computes, where max_seqlen is less than a sequence's length."""
    for row in range(first, end, ROWS):
        store_rows(X, tl.full([ROWS, COLS], float("nan"), tl.float32), row, stride, end, DIM, ROWS, COLS)


@triton.jit
def stages(first, last, full_first, full_last, BLOCK: tl.constexpr):
    """Bounds of the three stages: what is visible, and what of it is visible throughout; ends excluded."""
    begin = tl.maximum(first, 0) // BLOCK * BLOCK
    end = tl.maximum(last, begin)
    full = tl.minimum(tl.cdiv(tl.maximum(full_first, begin), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    edge = tl.maximum(tl.maximum(full_last, 0) // BLOCK * BLOCK, full)
    return begin, full, edge, end


@triton.jit
def key_stages(low, high, seq_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Stages over the keys that queries at positions low to high see."""
    first, last, full_first, full_last = 0, seq_k, 0, seq_k
    if RIGHT:
        last, full_last = tl.minimum(high + right + 1, seq_k), tl.minimum(low + right + 1, seq_k)
    if LEFT:
        first, full_first = low - left, high - left
    return stages(first, last, full_first, full_last, BLOCK)


@triton.jit
def visible(position, key, seq_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    seen = key <= tl.minimum(position + right, seq_k - 1) if RIGHT else key < seq_k
    if LEFT:
        seen &= key >= position - left
    return seen


@triton.jit
def logits(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2. Without softcap the scale has log2(e) in it; with it the softcap has."""
    s = tl.dot(a, b, input_precision="ieee") * scale
    if SOFTCAP:
        s = softcap * tanh(s)
    return s


@triton.jit
def score_gradient(s, p, dp, delta, softcap, SOFTCAP: tl.constexpr):
    """Gradient of the scaled scores, before the softcap."""
    ds = p * (dp - delta)
    if SOFTCAP:
        t = s / softcap
        ds *= 1.0 - t * t
    return ds


class Sizes(NamedTuple):
    sequences: int
    seq_q: int  # of packed sequences the longest
    seq_k: int
    heads: int
    heads_per_kv: int
    dim: int
    dim_v: int

    def of_lse(self, q: Tensor) -> tuple[int, int]:
        """The numbers lse_batch and lse_head: lse is [batch, heads, seq_q], or [heads, tokens]."""
        return 0 if q.dim() == 3 else self.heads * self.seq_q, q.shape[-3]


def sizes(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Sizes:
    cu_q, cu_k, max_q, max_k = packing
    sequences = q.shape[0] if cu_q is None else len(cu_q) - 1
    heads, dim, kv_heads = q.shape[-2], q.shape[-1], k.shape[-2]
    return Sizes(
        sequences, longest(q, cu_q, max_q), longest(k, cu_k, max_k), heads, heads // kv_heads, dim, v.shape[-1]
    )


def places(*tensors: Tensor) -> tuple[tuple[int, ...], bool]:
    """The numbers batch, seq and head of each tensor, its strides, and whether they are all aligned."""
    found: list[int] = []
    bits = 0
    for x in tensors:
        *batch, seq, head, _ = x.stride()
        first = batch[0] if batch and x.shape[0] > 1 else 0  # packed sequences have no batch
        found += (first, seq, head)
        bits |= first | seq | head
    return tuple(found), bits % 8 == 0


def option_numbers(options: Options) -> tuple[float, float, int, int]:
    """What every kernel is told of the options, scale, softcap, left and right; the scales as ``logits`` wants them."""
    scale, left, right, softcap = options
    if softcap:
        return scale / softcap, softcap * LOG2E.value, left, right
    return scale * LOG2E.value, 0.0, left, right


@functools.lru_cache(maxsize=1024)
def constants(options: Options, dim: int, dim_v: int) -> tuple[int, ...]:
    """LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_D and BLOCK_V of the options and the head dimensions.

    FUSE_SCALE: the largest score can be found before scaling, and the scale go into a multiply-add.
    """
    scale, left, right, softcap = options
    fuses_scale = scale > 0 and softcap == 0
    return left < UNBOUNDED, right < UNBOUNDED, softcap > 0, fuses_scale, dim, dim_v, padded(dim), padded(dim_v)


def group_size(seq: int, bytes_per_token: int, heads_per_kv: int, items: int) -> int:
    """How many heads to work on at once, see ``tile_indices``."""
    return min(items, heads_per_kv * max(1, L2_BYTES // max(1, seq * bytes_per_token)))


def padded(dim: int) -> int:
    return max(16, power_of_two(dim))
