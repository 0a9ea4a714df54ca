"""The warp-specialised backward of attention. See triton_specialized.py; what is computed is triton_backward.py's."""

from __future__ import annotations

import triton.language as tl

from ..triton_launch import Kernel
from .triton_specialized import MISSED, first_statistic, hide, readable_sequence
from .triton_tiles import (
    first_row,
    key_stages,
    logits,
    score_gradient,
    stages,
    start_of,
    store_missed,
    store_rows,
    tile_indices,
)


@Kernel
def specialized_dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, CU_Q, CU_K, DK, DV,
    seq_q, seq_k, heads, heads_per_kv, blocks, items, group_size,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head,
    lse_batch, lse_head, scale, softcap, left, right, dk_scale,
    ALIGNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, item = tile_indices(blocks, items, group_size)
    kv_heads = heads // heads_per_kv
    batch, kv_head = tl.cast(item // kv_heads, tl.int64), item % kv_heads
    first_q, seq_q = readable_sequence(CU_Q, batch, seq_q)
    first_k, seq_k = readable_sequence(CU_K, batch, seq_k)
    start = block * BLOCK_N
    first_head = kv_head * heads_per_kv
    Q = start_of(Q, batch, first_q, first_head, q_batch, q_seq, q_head, ALIGNED)
    DOUT = start_of(DOUT, batch, first_q, first_head, d_batch, d_seq, d_head, ALIGNED)
    K = start_of(K, batch, first_k, kv_head, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, kv_head, v_batch, v_seq, v_head, ALIGNED)
    q_tiles = tl.make_tensor_descriptor(Q, [heads_per_kv, seq_q, DIM], [q_head, q_seq, 1], [1, BLOCK_M, BLOCK_D])
    d_tiles = tl.make_tensor_descriptor(DOUT, [heads_per_kv, seq_q, DIM_V], [d_head, d_seq, 1], [1, BLOCK_M, BLOCK_V])
    k_tiles = tl.make_tensor_descriptor(K, [tl.maximum(seq_k, 1), DIM], [k_seq, 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [tl.maximum(seq_k, 1), DIM_V], [v_seq, 1], [BLOCK_N, BLOCK_V])
    # queries beyond the sequence are 0 in all that is loaded, and so are their shares of dv and dk
    at = batch * lse_batch + first_head * tl.cast(lse_head, tl.int64) + first_statistic(CU_Q, batch, first_q)
    lse_tiles = tl.make_tensor_descriptor(LSE + at, [heads_per_kv, seq_q], [lse_head, 1], [1, BLOCK_M])
    delta_tiles = tl.make_tensor_descriptor(DELTA + at, [heads_per_kv, seq_q], [lse_head, 1], [1, BLOCK_M])
    shift = seq_k - seq_q
    last_key = tl.minimum(start + BLOCK_N, seq_k) - 1
    first, last, full_first, full_last = 0, seq_q, 0, seq_q
    if RIGHT:
        first, full_first = start - shift - right, last_key - shift - right
    if LEFT:
        last = tl.minimum(seq_q, last_key - shift + left + 1)
        full_last = tl.minimum(seq_q, start - shift + left + 1)
    begin, full, edge, end = stages(first, last, full_first, full_last, BLOCK_M)
    k = k_tiles.load([start, 0])
    v = v_tiles.load([start, 0])
    position = tl.arange(0, BLOCK_N) + (start - shift)  # not start itself: see triton_specialized.py
    column = tl.arange(0, BLOCK_M)[None, :]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    steps = tl.cdiv(end - begin, BLOCK_M)
    if CU_K is not None:
        steps = tl.where(start < seq_k, steps, 0)  # of keys that are not there
    for step in tl.range(0, steps * heads_per_kv, warp_specialize=True):
        head = step // steps
        row = begin + step % steps * BLOCK_M
        whole = (row >= full) & (row < edge)
        q = q_tiles.load([head, row, 0]).reshape(BLOCK_M, BLOCK_D)
        lse = lse_tiles.load([head, row]).reshape(BLOCK_M)
        s = logits(k, q.T, scale, softcap, SOFTCAP)
        p = tl.exp2(s - lse[None, :])
        if RIGHT:
            p = hide(p, (position - right - row)[:, None], column, whole, True)
        if LEFT:
            p = hide(p, column, (position + left - row)[:, None], whole, True)
        dout = d_tiles.load([head, row, 0]).reshape(BLOCK_M, BLOCK_V)
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        dp = tl.dot(v, dout.T)
        delta = delta_tiles.load([head, row]).reshape(BLOCK_M)
        ds = score_gradient(s, p, dp, delta[None, :], softcap, SOFTCAP)
        dk = tl.dot(ds.to(q.dtype), q, dk)
    first_k = first_row(CU_K, batch, first_k, seq_k)
    DK += first_k * (kv_heads * DIM) + kv_head * DIM
    DV += first_k * (kv_heads * DIM_V) + kv_head * DIM_V
    if CU_K is not None:  # noqa: SIM102 (one is known when compiling)
        if block == blocks - 1:
            store_missed(DK, blocks * BLOCK_N, kv_heads * DIM, seq_k, DIM, MISSED, BLOCK_D)
            store_missed(DV, blocks * BLOCK_N, kv_heads * DIM_V, seq_k, DIM_V, MISSED, BLOCK_V)
    store_rows(DK, dk * dk_scale, start, kv_heads * DIM, seq_k, DIM, BLOCK_N, BLOCK_D)
    store_rows(DV, dv, start, kv_heads * DIM_V, seq_k, DIM_V, BLOCK_N, BLOCK_V)


@Kernel
def specialized_dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, CU_Q, CU_K, DQ,
    seq_q, seq_k, heads, heads_per_kv, blocks, items, group_size,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, d_batch, d_seq, d_head,
    lse_batch, lse_head, scale, softcap, left, right, dq_scale,
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
    DOUT = start_of(DOUT, batch, first_q, head, d_batch, d_seq, d_head, ALIGNED)
    K = start_of(K, batch, first_k, head // heads_per_kv, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, head // heads_per_kv, v_batch, v_seq, v_head, ALIGNED)
    q_tiles = tl.make_tensor_descriptor(Q, [tl.maximum(seq_q, 1), DIM], [q_seq, 1], [BLOCK_M, BLOCK_D])
    d_tiles = tl.make_tensor_descriptor(DOUT, [tl.maximum(seq_q, 1), DIM_V], [d_seq, 1], [BLOCK_M, BLOCK_V])
    k_tiles = tl.make_tensor_descriptor(K, [seq_k, DIM], [k_seq, 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(V, [seq_k, DIM_V], [v_seq, 1], [BLOCK_N, BLOCK_V])
    at = batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_statistic(CU_Q, batch, first_q)
    lse_tiles = tl.make_tensor_descriptor(LSE + at, [tl.maximum(seq_q, 1)], [1], [BLOCK_M])
    delta_tiles = tl.make_tensor_descriptor(DELTA + at, [tl.maximum(seq_q, 1)], [1], [BLOCK_M])
    shift = seq_k - seq_q
    position = tl.arange(0, BLOCK_M) + (row + shift)  # not row itself
    begin, full, edge, end = key_stages(
        row + shift, tl.minimum(row + BLOCK_M, seq_q) - 1 + shift, seq_k, left, right, LEFT, RIGHT, BLOCK_N
    )
    end = tl.where(row < seq_q, end, begin)  # of a row that is not there
    q = q_tiles.load([row, 0])
    dout = d_tiles.load([row, 0])
    lse, delta = lse_tiles.load([row]), delta_tiles.load([row])
    column = tl.arange(0, BLOCK_N)[None, :]
    high = tl.zeros([BLOCK_M], tl.int32) + seq_k - 1
    if RIGHT:
        high = tl.minimum(position + right, seq_k - 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        k = k_tiles.load([start, 0])
        v = v_tiles.load([start, 0])
        whole = (start >= full) & (start < edge)
        s = logits(q, k.T, scale, softcap, SOFTCAP)
        p = tl.exp2(s - lse[:, None])
        p = hide(p, column, (high - start)[:, None], whole, True)
        if LEFT:
            p = hide(p, (position - left - start)[:, None], column, whole, True)
        dp = tl.dot(dout, v.T)
        ds = score_gradient(s, p, dp, delta[:, None], softcap, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    DQ += first_row(CU_Q, batch, first_q, seq_q) * (heads * DIM) + head * DIM
    if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
        if block == 0:
            store_missed(DQ, blocks * BLOCK_M, heads * DIM, seq_q, DIM, MISSED, BLOCK_D)
    store_rows(DQ, dq * dq_scale, row, heads * DIM, seq_q, DIM, BLOCK_M, BLOCK_D)
