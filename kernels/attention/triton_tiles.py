"""What the attention kernels in Triton share: tiles, the stages of a loop, scores, and their launchers' numbers.

Logits are in base 2. A program's blocks come in three stages, of which only the outer two compare
positions: the window's lower edge, blocks that are visible throughout, and the diagonal or the end.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import tanh
from .options import UNBOUNDED, Options
from .packing import Packing, longest

L2_BYTES = 2**24  # keys and values that programs running at once share in the L2 cache
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
NOT_SPECIALIZED = ["seq_q", "seq_k", "blocks", "items", "group_size", "left", "right"]


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
        s = softcap * tanh(s, a.dtype == tl.float32)
    return s


class Sizes(NamedTuple):
    sequences: int
    seq_q: int  # of packed sequences the longest
    seq_k: int
    heads: int
    heads_per_kv: int
    dim: int
    dim_v: int


def sizes(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Sizes:
    cu_q, cu_k, max_q, max_k = packing
    sequences = q.shape[0] if cu_q is None else len(cu_q) - 1
    (heads, dim), kv_heads = q.shape[-2:], k.shape[-2]
    return Sizes(
        sequences, longest(q, cu_q, max_q), longest(k, cu_k, max_k), heads, heads // kv_heads, dim, v.shape[-1]
    )


def batch_stride(x: Tensor) -> int:
    return x.stride(0) if x.dim() == 4 else 0  # packed sequences have no batch


def head_strides(**tensors: Tensor) -> dict[str, int]:
    """For ``x`` the keywords x_batch, x_seq and x_head."""
    found = {}
    for name, x in tensors.items():
        found |= {f"{name}_batch": batch_stride(x), f"{name}_seq": x.stride(-3), f"{name}_head": x.stride(-2)}
    return found


def common_arguments(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, packing: Packing, options: Options, size: Sizes
) -> dict[str, Any]:
    """What the forward kernel and those of the backward pass have in common, by keyword."""
    return {
        "Q": q,
        "K": k,
        "V": v,
        "LSE": lse,
        "CU_Q": packing.cu_seqlens_q,
        "CU_K": packing.cu_seqlens_k,
        "seq_q": size.seq_q,
        "seq_k": size.seq_k,
        "heads": size.heads,
        "heads_per_kv": size.heads_per_kv,
        "lse_batch": 0 if q.dim() == 3 else size.heads * size.seq_q,  # [batch, heads, seq_q] or [heads, tokens]
        "lse_head": q.shape[-3],
        **head_strides(q=q, k=k, v=v),
        **option_arguments(options, size.dim, size.dim_v),
    }


def option_arguments(options: Options, dim: int, dim_v: int) -> dict[str, float]:
    """What every kernel is told of the options and of head dimensions; the scales as ``logits`` wants them."""
    scale, softcap = options.scale, options.softcap
    return {
        "scale": scale / softcap if softcap else scale * LOG2E.value,
        "softcap": softcap * LOG2E.value if softcap else 0.0,
        "left": options.left,
        "right": options.right,
        "LEFT": options.left < UNBOUNDED,
        "RIGHT": options.right < UNBOUNDED,
        "SOFTCAP": softcap > 0,
        "DIM": dim,
        "BLOCK_D": padded(dim),
        "DIM_V": dim_v,
        "BLOCK_V": padded(dim_v),
    }


def fuses_scale(options: Options) -> bool:
    """Whether the largest score can be found before scaling, and the scale go into a multiply-add."""
    return options.scale > 0 and options.softcap == 0


def group_size(seq: int, bytes_per_token: int, heads_per_kv: int, items: int) -> int:
    """How many heads to work on at once, see ``tile_indices``."""
    return min(items, heads_per_kv * max(1, L2_BYTES // max(1, seq * bytes_per_token)))


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def shape_class(*sizes: int | bool) -> str:
    """Shapes that share a tuned configuration: sizes to the next power of two."""
    return " ".join(str(triton.next_power_of_2(n)) if isinstance(n, int) and n > 1 else str(int(n)) for n in sizes)
