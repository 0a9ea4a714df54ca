"""Flash-Decoding in Triton of keys and values that lie in pages.

Memory-bound, as triton_decode.py. A row's bits depend on nothing but its query and the keys that it sees: parts of the
keys begin at fixed positions, a tile holds as many rows and keys in every call, and parts are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, cdiv, multiple
from . import triton_tuning
from .options import Options
from .triton_tiles import LN2, LOG2E, constants, logits, option_numbers, padded, places, visible

PART = 512  # keys of a program: a multiple of every tile
ROWS = 16  # of a tile, whatever there is: a tensor core's least
CHUNK = 8  # parts that are added at once


@triton.jit
def keys_seen(low, high, seq_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The first key that queries at positions low to high see, and that after the last."""
    begin, end = seq_k * 0, seq_k
    if LEFT:
        begin = tl.maximum(low - left, 0)
    if RIGHT:
        end = tl.minimum(high + right + 1, seq_k)
    return begin, end


@Kernel
def paged_kernel(
    Q, K, V, TABLE, LENGTHS, SINKS, OUT, LSE,
    seq_q, seq_k, heads, heads_per_kv, row_blocks, parts, page_size, pages, columns,
    q_batch, q_seq, q_head, k_page, k_seq, k_head, v_page, v_seq, v_head, rows, part_keys,
    lse_scale, scale, softcap, left, right,
    ALIGNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT and LSE have one part of ``rows`` per program of a sequence, each as if its keys were all; the first has the
    sink. Nothing is written of a part in which no row sees a key, but of the first."""
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    kv_heads = heads // heads_per_kv
    item, block = block // row_blocks, block % row_blocks
    batch, kv_head = tl.cast(item // kv_heads, tl.int64), item % kv_heads
    seq_k = tl.minimum(tl.maximum(tl.load(LENGTHS + batch), 0), seq_k).to(tl.int32)
    shift = seq_k - seq_q
    lowest = block * BLOCK_M // heads_per_kv
    highest = tl.minimum(((block + 1) * BLOCK_M - 1) // heads_per_kv, seq_q - 1)
    begin, end = keys_seen(lowest + shift, highest + shift, seq_k, left, right, LEFT, RIGHT)
    start = tl.maximum(begin // BLOCK_N * BLOCK_N, part * part_keys)
    end = tl.minimum(end, (part + 1) * part_keys)
    if (part > 0) & (start >= end):
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // heads_per_kv, kv_head * heads_per_kv + row % heads_per_kv
    inside = (query < seq_q)[:, None]
    position = query + shift
    col, col_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    offsets = query.to(tl.int64) * multiple(q_seq, ALIGNED) + head.to(tl.int64) * multiple(q_head, ALIGNED)
    q = tl.load(Q + batch * multiple(q_batch, ALIGNED) + offsets[:, None] + col, inside & (col < DIM), other=0.0)
    k_page, k_seq = multiple(k_page, ALIGNED), multiple(k_seq, ALIGNED)
    v_page, v_seq = multiple(v_page, ALIGNED), multiple(v_seq, ALIGNED)
    K += kv_head.to(tl.int64) * multiple(k_head, ALIGNED)
    V += kv_head.to(tl.int64) * multiple(v_head, ALIGNED)
    TABLE += batch * columns
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS is not None:  # noqa: SIM102 (one is known when compiling)
        if part == 0:
            row_max = tl.load(SINKS + head, query < seq_q, other=0.0) * LOG2E
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    outside = tl.zeros([BLOCK_N], tl.int32)
    for first in tl.range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        seen = (key >= begin) & (key < end)
        page = tl.load(TABLE + key // page_size, seen, other=0)
        missing = (page < 0) | (page >= pages)
        outside |= missing.to(tl.int32)
        held = (seen & ~missing)[:, None]
        page, within = page.to(tl.int64), (key % page_size).to(tl.int64)
        k = tl.load(K + (page * k_page + within * k_seq)[:, None] + col, held & (col < DIM), other=0.0)
        s = logits(q, k.T, scale, softcap, SOFTCAP)
        s = tl.where(visible(position[:, None], key[None, :], end, left, right, LEFT, RIGHT), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing
        p, alpha = tl.exp2(s - base[:, None]), tl.exp2(row_max - base)
        v = tl.load(V + (page * v_page + within * v_seq)[:, None] + col_v, held & (col_v < DIM_V), other=0.0)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    row_sum = tl.where(tl.max(outside, 0) > 0, float("nan"), row_sum)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    first_row = part.to(tl.int64) * rows
    OUT += (first_row + (batch * seq_q + query) * heads + head)[:, None] * DIM_V
    tl.store(OUT + col_v, acc.to(OUT.dtype.element_ty), inside & (col_v < DIM_V))
    if LSE is not None:
        LSE += first_row + (batch * heads + head) * seq_q
        tl.store(LSE + query, (row_max + tl.log2(row_sum)) * lse_scale, query < seq_q)


@Kernel
def join_kernel(
    PARTS, PART_LSE, LENGTHS, SINKS, OUT, LSE, seq_q, seq_k, heads, rows, part_keys, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The parts of a row in which it sees keys, each weighted by its share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)  # [batch, query, head]
    batch, query, head = row // heads // seq_q, (row // heads % seq_q).to(tl.int32), row % heads
    seq_k = tl.minimum(tl.maximum(tl.load(LENGTHS + batch), 0), seq_k).to(tl.int32)
    position = seq_k - seq_q + query
    begin, end = keys_seen(position, position, seq_k, left, right, LEFT, RIGHT)
    begin, end = begin // part_keys, tl.cdiv(tl.maximum(end, 0), part_keys)
    start = begin // CHUNK * CHUNK
    if SINKS is not None:
        start = start * 0
    lse_offset = (batch * heads + head) * seq_q + query
    col = tl.arange(0, BLOCK_D)[None, :]
    row_max, row_sum = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for first in tl.range(start, tl.maximum(end, 1), CHUNK):
        part = first + tl.arange(0, CHUNK)
        there = (part >= begin) & (part < end)
        if SINKS is not None:
            there |= part == 0
        lse = tl.load(PART_LSE + part.to(tl.int64) * rows + lse_offset, there, other=float("-inf"))
        nan = tl.max((lse != lse).to(tl.int32), 0) > 0  # a maximum passes over it
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight, alpha = tl.exp2(lse - base), tl.exp2(row_max - base)
        offsets = (part[:, None].to(tl.int64) * rows + row) * DIM + col
        parts = tl.load(PARTS + offsets, there[:, None] & (col < DIM), other=0.0)
        row_sum = tl.where(nan, float("nan"), row_sum * alpha + tl.sum(weight, 0))
        acc = acc * alpha + tl.sum(parts * weight[:, None], 0, keep_dims=True)
        row_max = new_max
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(OUT + row * DIM + col, out.to(OUT.dtype.element_ty), col < DIM)
    if LSE is not None:
        tl.store(LSE + lse_offset, (row_max + tl.log2(row_sum)) * LN2)


def attention_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    sinks: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    (batch, seq_q, heads, dim), (pages, page_size, kv_heads, _) = q.shape, k.shape
    columns, heads_per_kv, dim_v = block_table.shape[1], heads // kv_heads, v.shape[-1]
    capacity, rows = columns * page_size, batch * seq_q * heads
    row_blocks, parts = cdiv(seq_q * heads_per_kv, ROWS), max(1, cdiv(capacity, PART))
    at, even = places(q, k, v)
    sizes = seq_q, capacity, heads, heads_per_kv, row_blocks, parts, page_size, pages, columns
    results, result_lse = out, lse
    if parts > 1:
        results = torch.empty(parts, rows, dim_v, dtype=torch.float32, device=q.device)
        result_lse = torch.empty(parts, rows, dtype=torch.float32, device=q.device)  # in base 2

    def call(config: triton_tuning.Config) -> None:
        _, block_n, warps, stages, _ = config
        paged_kernel(
            (batch * kv_heads * row_blocks * parts, 1, 1),
            (q, k, v, block_table, seqlens_k, sinks, results, result_lse),
            (*sizes, *at, rows, PART, LN2.value if parts == 1 else 1.0, *option_numbers(options)),
            (even, *constants(options, dim, dim_v), ROWS, block_n),
            warps,
            num_stages=stages,
        )
        if parts > 1:
            windowed = constants(options, dim, dim_v)[:2]
            join_kernel(
                (rows, 1, 1),
                (results, result_lse, seqlens_k, sinks, out, lse),
                (seq_q, capacity, heads, rows, PART, options.left, options.right),
                (*windowed, dim_v, padded(dim_v), CHUNK),
            )

    # One search serves every shape: a tile of another size has other bits.
    triton_tuning.launch("paged", q, v, options, (), call, (out, lse))
