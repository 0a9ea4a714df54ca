"""Flash attention in Triton, backward (Dao, 2023, https://arxiv.org/abs/2307.08691).

Three kernels (delta, dk and dv, dq) that recompute the scores: 14·dim operations per visible pair, where
the floor is 10·dim, and no atomics.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, cdiv, multiple
from . import triton_tuning
from .options import Options
from .packing import Packing
from .triton_specialized import can_specialize, statistics, with_memory
from .triton_specialized_backward import specialized_dkdv_kernel, specialized_dq_kernel
from .triton_tiles import (
    LOG2E,
    constants,
    first_row,
    group_size,
    key_stages,
    load_rows,
    logits,
    option_numbers,
    padded,
    places,
    score_gradient,
    sequence,
    sizes,
    stages,
    start_of,
    store_missed,
    store_rows,
    tile_indices,
    visible,
)

DELTA_ROWS = 16  # tokens of a program


@Kernel
def delta_kernel(
    DOUT, OUT, DLSE, DELTA, seq, heads, blocks, d_batch, d_seq, d_head,
    ALIGNED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dout · out) - dlse, of ROWS tokens of one head."""
    item, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = tl.cast(item // heads, tl.int64), item % heads
    DOUT = start_of(DOUT, batch, 0, head, d_batch, d_seq, d_head, ALIGNED)
    OUT += (batch * seq * heads + head) * DIM
    dout = load_rows(DOUT, first, multiple(d_seq, ALIGNED), seq, True, DIM, ROWS, BLOCK_D).to(tl.float32)
    out = load_rows(OUT, first, heads * DIM, seq, True, DIM, ROWS, BLOCK_D).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    row = first + tl.arange(0, ROWS)
    offsets = tl.cast(item, tl.int64) * seq + row
    if DLSE is not None:
        delta -= tl.load(DLSE + offsets, row < seq, other=0.0)
    tl.store(DELTA + offsets, delta, row < seq)


@triton.jit
def load_statistics(LSE, DELTA, row, seq_q):
    """lse in base 2, and delta; rows that are not there or see nothing get probability 0 everywhere."""
    lse = tl.load(LSE + row, row < seq_q, other=float("inf"))
    delta = tl.load(DELTA + row, row < seq_q, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@Kernel
def dkdv_kernel(
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
    first_q, seq_q = sequence(CU_Q, batch, seq_q)
    first_k, seq_k = sequence(CU_K, batch, seq_k)
    start = block * BLOCK_N
    if start >= seq_k:
        return
    K = start_of(K, batch, first_k, kv_head, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, kv_head, v_batch, v_seq, v_head, ALIGNED)
    q_seq, q_head, d_seq, d_head = (
        multiple(q_seq, ALIGNED), multiple(q_head, ALIGNED), multiple(d_seq, ALIGNED), multiple(d_head, ALIGNED)
    )  # fmt: skip
    Q += batch * multiple(q_batch, ALIGNED) + first_q * q_seq
    DOUT += batch * multiple(d_batch, ALIGNED) + first_q * d_seq
    LSE += batch * lse_batch + first_q
    DELTA += batch * lse_batch + first_q
    k = load_rows(K, start, multiple(k_seq, ALIGNED), seq_k, True, DIM, BLOCK_N, BLOCK_D)
    v = load_rows(V, start, multiple(v_seq, ALIGNED), seq_k, True, DIM_V, BLOCK_N, BLOCK_V)
    shift = seq_k - seq_q
    key = start + tl.arange(0, BLOCK_N)
    last_key = tl.minimum(start + BLOCK_N, seq_k) - 1
    first, last, full_first, full_last = 0, seq_q, 0, seq_q
    if RIGHT:
        first, full_first = start - shift - right, last_key - shift - right
    if LEFT:
        last = tl.minimum(seq_q, last_key - shift + left + 1)
        full_last = tl.minimum(seq_q, start - shift + left + 1)
    begin, full, edge, end = stages(first, last, full_first, full_last, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # One loop over the heads of the heads_per_kv and their queries, which are masked where they must be:
    # three stages in a loop over heads need more registers than there are.
    steps = tl.cdiv(end - begin, BLOCK_M)
    for step in tl.range(0, steps * heads_per_kv):
        head = tl.cast(kv_head * heads_per_kv + step // steps, tl.int64)
        row = begin + step % steps * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(Q + head * q_head, row, q_seq, seq_q, True, DIM, BLOCK_M, BLOCK_D)
        lse, delta = load_statistics(LSE + head * lse_head, DELTA + head * lse_head, rows, seq_q)
        s = logits(k, q.T, scale, softcap, SOFTCAP)
        p = tl.exp2(s - lse[None, :])
        if LEFT or RIGHT:  # noqa: SIM102 (one is known when compiling)
            if (row < full) | (row >= edge):
                p = tl.where(visible((rows + shift)[None, :], key[:, None], seq_k, left, right, LEFT, RIGHT), p, 0.0)
        dout = load_rows(DOUT + head * d_head, row, d_seq, seq_q, True, DIM_V, BLOCK_M, BLOCK_V)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        ds = score_gradient(s, p, dp, delta[None, :], softcap, SOFTCAP)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    first_k = first_row(CU_K, batch, first_k, seq_k)
    DK += first_k * (kv_heads * DIM) + kv_head * DIM
    DV += first_k * (kv_heads * DIM_V) + kv_head * DIM_V
    if CU_K is not None:  # noqa: SIM102 (one is known when compiling)
        if block == blocks - 1:
            store_missed(DK, blocks * BLOCK_N, kv_heads * DIM, seq_k, DIM, BLOCK_N, BLOCK_D)
            store_missed(DV, blocks * BLOCK_N, kv_heads * DIM_V, seq_k, DIM_V, BLOCK_N, BLOCK_V)
    store_rows(DK, dk * dk_scale, start, kv_heads * DIM, seq_k, DIM, BLOCK_N, BLOCK_D)
    store_rows(DV, dv, start, kv_heads * DIM_V, seq_k, DIM_V, BLOCK_N, BLOCK_V)


@triton.jit
def add_dq(
    dq, q, dout, lse, delta, K, V, k_seq, v_seq, position, begin, end, seq_k, scale, softcap, left, right,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from begin to end give."""
    for start in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, start, k_seq, seq_k, MASKED, DIM, BLOCK_N, BLOCK_D)
        v = load_rows(V, start, v_seq, seq_k, MASKED, DIM_V, BLOCK_N, BLOCK_V)
        s = logits(q, k.T, scale, softcap, SOFTCAP)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            p = tl.where(visible(position[:, None], key[None, :], seq_k, left, right, LEFT, RIGHT), p, 0.0)
        dp = tl.dot(dout, v.T, input_precision="ieee")
        ds = score_gradient(s, p, dp, delta[:, None], softcap, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@Kernel
def dq_kernel(
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
    first_q, seq_q = sequence(CU_Q, batch, seq_q)
    first_k, seq_k = sequence(CU_K, batch, seq_k)
    row = (blocks - 1 - block) * BLOCK_M  # longest first
    if row >= seq_q:
        return
    Q = start_of(Q, batch, first_q, head, q_batch, q_seq, q_head, ALIGNED)
    K = start_of(K, batch, first_k, head // heads_per_kv, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, head // heads_per_kv, v_batch, v_seq, v_head, ALIGNED)
    DOUT = start_of(DOUT, batch, first_q, head, d_batch, d_seq, d_head, ALIGNED)
    k_seq, v_seq = multiple(k_seq, ALIGNED), multiple(v_seq, ALIGNED)
    statistics = batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q
    q = load_rows(Q, row, multiple(q_seq, ALIGNED), seq_q, True, DIM, BLOCK_M, BLOCK_D)
    dout = load_rows(DOUT, row, multiple(d_seq, ALIGNED), seq_q, True, DIM_V, BLOCK_M, BLOCK_V)
    rows = row + tl.arange(0, BLOCK_M)
    lse, delta = load_statistics(LSE + statistics, DELTA + statistics, rows, seq_q)
    shift = seq_k - seq_q
    begin, full, edge, end = key_stages(
        row + shift, tl.minimum(row + BLOCK_M, seq_q) - 1 + shift, seq_k, left, right, LEFT, RIGHT, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        dq = add_dq(
            dq, q, dout, lse, delta, K, V, k_seq, v_seq, rows + shift, begin, tl.minimum(full, end), seq_k, scale,
            softcap, left, right, True, LEFT, RIGHT, SOFTCAP, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, K, V, k_seq, v_seq, rows + shift, full, edge, seq_k, scale, softcap, left, right,
        False, LEFT, RIGHT, SOFTCAP, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    dq = add_dq(
        dq, q, dout, lse, delta, K, V, k_seq, v_seq, rows + shift, edge, end, seq_k, scale, softcap, left, right,
        True, LEFT, RIGHT, SOFTCAP, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    DQ += first_row(CU_Q, batch, first_q, seq_q) * (heads * DIM) + head * DIM
    if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
        if block == 0:
            store_missed(DQ, blocks * BLOCK_M, heads * DIM, seq_q, DIM, BLOCK_M, BLOCK_D)
    store_rows(DQ, dq * dq_scale, row, heads * DIM, seq_q, DIM, BLOCK_M, BLOCK_D)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    options: Options,
    deterministic: bool,
    backend: str,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
) -> None:
    """Without atomics, so the same bit for bit, whatever ``deterministic`` says."""
    if delta.numel() == 0:  # no query, or no head of them
        dk.zero_()
        dv.zero_()
        return
    size = sizes(q, k, v, packing)
    sequences, seq_q, seq_k, heads, heads_per_kv, dim, dim_v = size
    bytes_per_token = (dim + dim_v) * q.element_size()
    at, even = places(q, k, v, dout)
    known, rest = constants(options, dim, dim_v), (*option_numbers(options), options.scale)

    @functools.cache
    def rows(specialized: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
        return statistics(lse, delta, size, packing) if specialized else (lse, delta, size.of_lse(q))

    def call(
        kernels: tuple[Kernel, Kernel], config: triton_tuning.Config, grid: tuple[int, int, int], *grads: Tensor
    ) -> None:
        block_m, block_n, warps, stages, specialized = config
        row_lse, row_delta, lse_at = rows(specialized)
        tensors = (q, k, v, dout, row_lse, row_delta, *packing[:2], *grads)
        numbers = (seq_q, seq_k, heads, heads_per_kv, *grid, *at, *lse_at, *rest)
        launch = with_memory(kernels[1]) if specialized else kernels[0]
        constant = (even, *known, block_m, block_n)
        launch((grid[0] * grid[1], 1, 1), tensors, numbers, constant, warps, num_stages=stages)

    def call_dkdv(config: triton_tuning.Config) -> None:
        items = sequences * heads // heads_per_kv
        group = group_size(seq_q, heads_per_kv * bytes_per_token, 1, items)
        grid = cdiv(seq_k, config.block_n), items, group
        call((dkdv_kernel, specialized_dkdv_kernel), config, grid, dk, dv)

    def call_dq(config: triton_tuning.Config) -> None:
        items = sequences * heads
        grid = cdiv(seq_q, config.block_m), items, group_size(seq_k, bytes_per_token, heads_per_kv, items)
        call((dq_kernel, specialized_dq_kernel), config, grid, dq)

    def special() -> bool:
        return can_specialize(q, k, v, dout)

    tokens = q.shape[-3]
    blocks = cdiv(tokens, DELTA_ROWS)
    at_dout, even_dout = places(dout)
    delta_kernel(
        (blocks * (delta.numel() // tokens), 1, 1),
        (dout, out, dlse, delta),
        (tokens, heads, blocks, *at_dout),
        (even_dout, dim_v, padded(dim_v), DELTA_ROWS),
    )
    shape = (sequences * heads, heads_per_kv, seq_q, seq_k, options.left, options.right)
    if seq_k:
        triton_tuning.launch("dkdv", q, v, options, shape, call_dkdv, (dk, dv), special)
    triton_tuning.launch("dq", q, v, options, shape, call_dq, (dq,), special)
