"""The warp-specialised forward of attention. See triton_specialized.py; what it computes is triton_forward.py's."""

from __future__ import annotations

import triton.language as tl

from ..triton_launch import Kernel
from .triton_specialized import MISSED, hide, readable_sequence
from .triton_tiles import (
    LN2,
    LOG2E,
    first_row,
    key_stages,
    logits,
    start_of,
    store_missed,
    store_rows,
    tile_indices,
)


@Kernel
def specialized_forward_kernel(
    Q, K, V, SINKS, CU_Q, CU_K, OUT, LSE,
    seq_q, seq_k, heads, heads_per_kv, blocks, items, group_size,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, lse_batch, lse_head,
    scale, softcap, left, right,
    ALIGNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, item = tile_indices(blocks, items, group_size)
    batch, head = tl.cast(item // heads, tl.int64), item % heads
    first_q, seq_q = readable_sequence(CU_Q, batch, seq_q)
    first_k, seq_k = readable_sequence(CU_K, batch, seq_k)
    row = (blocks - 1 - block) * BLOCK_M  # longest first
    Q = start_of(Q, batch, first_q, head, q_batch, q_seq, q_head, ALIGNED)
    K = start_of(K, batch, first_k, head // heads_per_kv, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, head // heads_per_kv, v_batch, v_seq, v_head, ALIGNED)
    q_tiles = tl.make_tensor_descriptor(Q, [tl.maximum(seq_q, 1), DIM], [q_seq, 1], [BLOCK_M, BLOCK_D])
    k_tiles = tl.make_tensor_descriptor(K, [seq_k, DIM], [k_seq, 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [seq_k, DIM_V], [v_seq, 1], [BLOCK_N, BLOCK_V])
    shift = seq_k - seq_q
    within = tl.arange(0, BLOCK_M)
    position = within + (row + shift)  # not row itself: see triton_specialized.py
    begin, full, edge, end = key_stages(
        row + shift, tl.minimum(row + BLOCK_M, seq_q) - 1 + shift, seq_k, left, right, LEFT, RIGHT, BLOCK_N
    )
    end = tl.where(row < seq_q, end, begin)  # of a row that is not there
    q = q_tiles.load([row, 0])
    column = tl.arange(0, BLOCK_N)[None, :]
    high = tl.zeros([BLOCK_M], tl.int32) + seq_k - 1
    if RIGHT:
        high = tl.minimum(position + right, seq_k - 1)
    sink = tl.full([], float("-inf"), tl.float32)
    if SINKS is not None:
        sink = tl.load(SINKS + head) * LOG2E
    row_max = tl.zeros([BLOCK_M], tl.float32) + sink
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        k = k_tiles.load([start, 0])
        whole = (start >= full) & (start < edge)
        s = tl.dot(q, k.T) if FUSE_SCALE else logits(q, k.T, scale, softcap, SOFTCAP)
        s = hide(s, column, (high - start)[:, None], whole, False)
        if LEFT:
            s = hide(s, (position - left - start)[:, None], column, whole, False)
        factor = scale if FUSE_SCALE else 1.0
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing
        p = tl.exp2(s * factor - base[:, None])
        alpha = tl.exp2(row_max - base)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = v_tiles.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    OUT += first_row(CU_Q, batch, first_q, seq_q) * (heads * DIM_V) + head * DIM_V
    if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
        if block == 0:
            store_missed(OUT, blocks * BLOCK_M, heads * DIM_V, seq_q, DIM_V, MISSED, BLOCK_V)
    store_rows(OUT, acc, row, heads * DIM_V, seq_q, DIM_V, BLOCK_M, BLOCK_V)
    if LSE is not None:
        LSE += batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q
        tl.store(LSE + row + within, (row_max + tl.log2(row_sum)) * LN2, within < seq_q - row)
        if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
            if block == 0:
                for missed in range(row + BLOCK_M, seq_q, BLOCK_M):
                    there = missed + tl.arange(0, BLOCK_M)
                    tl.store(LSE + there, tl.full([BLOCK_M], float("nan"), tl.float32), there < seq_q)
