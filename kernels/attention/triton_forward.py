"""Flash attention in Triton, forward (Dao, 2023, https://arxiv.org/abs/2307.08691).

Compute-bound: the floor is 4·dim operations per visible pair of query and key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, cdiv, multiple
from . import triton_tuning
from .options import Options
from .packing import Packing
from .triton_specialized import can_specialize, with_memory
from .triton_specialized_forward import specialized_forward_kernel
from .triton_tiles import (
    LN2,
    LOG2E,
    constants,
    first_row,
    group_size,
    key_stages,
    load_rows,
    logits,
    option_numbers,
    places,
    sequence,
    sizes,
    start_of,
    store_missed,
    store_rows,
    tile_indices,
    visible,
)


@triton.jit
def attend(
    acc, row_sum, row_max, q, K, V, k_seq, v_seq, position, begin, end, seq_k, scale, softcap, left, right,
    MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Online softmax of q over the keys from begin to end."""
    for start in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, start, k_seq, seq_k, MASKED, DIM, BLOCK_N, BLOCK_D)
        if FUSE_SCALE and not MASKED:  # one multiply-add scales and subtracts
            s = tl.dot(q, k.T, input_precision="ieee")
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)
        else:
            s = logits(q, k.T, scale, softcap, SOFTCAP)
            if MASKED:
                key = start + tl.arange(0, BLOCK_N)
                s = tl.where(
                    visible(position[:, None], key[None, :], seq_k, left, right, LEFT, RIGHT), s, float("-inf")
                )
            new_max = tl.maximum(row_max, tl.max(s, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(row_max - base)
        v = load_rows(V, start, v_seq, seq_k, MASKED, DIM_V, BLOCK_N, BLOCK_V)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def attend_stages(
    acc, row_sum, row_max, q, K, V, k_seq, v_seq, position, begin, full, edge, end, seq_k, scale, softcap, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if LEFT:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, K, V, k_seq, v_seq, position, begin, tl.minimum(full, end), seq_k, scale, softcap,
            left, right, True, LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, K, V, k_seq, v_seq, position, full, edge, seq_k, scale, softcap, left, right,
        False, LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    return attend(
        acc, row_sum, row_max, q, K, V, k_seq, v_seq, position, edge, end, seq_k, scale, softcap, left, right,
        True, LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip


@Kernel
def forward_kernel(
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
    first_q, seq_q = sequence(CU_Q, batch, seq_q)
    first_k, seq_k = sequence(CU_K, batch, seq_k)
    row = (blocks - 1 - block) * BLOCK_M  # longest first
    if row >= seq_q:
        return
    Q = start_of(Q, batch, first_q, head, q_batch, q_seq, q_head, ALIGNED)
    K = start_of(K, batch, first_k, head // heads_per_kv, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, first_k, head // heads_per_kv, v_batch, v_seq, v_head, ALIGNED)
    k_seq, v_seq = multiple(k_seq, ALIGNED), multiple(v_seq, ALIGNED)
    q = load_rows(Q, row, multiple(q_seq, ALIGNED), seq_q, True, DIM, BLOCK_M, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_M)
    shift = seq_k - seq_q
    begin, full, edge, end = key_stages(
        row + shift, tl.minimum(row + BLOCK_M, seq_q) - 1 + shift, seq_k, left, right, LEFT, RIGHT, BLOCK_N
    )
    sink = tl.full([], float("-inf"), tl.float32)
    if SINKS is not None:
        sink = tl.load(SINKS + head) * LOG2E
    row_max = tl.zeros([BLOCK_M], tl.float32) + sink
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc, row_sum, row_max = attend_stages(
        acc, row_sum, row_max, q, K, V, k_seq, v_seq, rows + shift, begin, full, edge, end, seq_k, scale, softcap,
        left, right, LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    OUT += first_row(CU_Q, batch, first_q, seq_q) * (heads * DIM_V) + head * DIM_V
    if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
        if block == 0:
            store_missed(OUT, blocks * BLOCK_M, heads * DIM_V, seq_q, DIM_V, BLOCK_M, BLOCK_V)
    store_rows(OUT, acc, row, heads * DIM_V, seq_q, DIM_V, BLOCK_M, BLOCK_V)
    if LSE is not None:
        LSE += batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q
        tl.store(LSE + rows, (row_max + tl.log2(row_sum)) * LN2, rows < seq_q)
        if CU_Q is not None:  # noqa: SIM102 (one is known when compiling)
            if block == 0:
                for missed in range(row + BLOCK_M, seq_q, BLOCK_M):
                    there = missed + tl.arange(0, BLOCK_M)
                    tl.store(LSE + there, tl.full([BLOCK_M], float("nan"), tl.float32), there < seq_q)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    backend: str,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    size = sizes(q, k, v, packing)
    sequences, seq_q, seq_k, heads, heads_per_kv, dim, dim_v = size
    items = sequences * heads
    at, even = places(q, k, v)
    group = group_size(seq_k, (dim + dim_v) * k.element_size(), heads_per_kv, items)
    tensors = (q, k, v, sinks, *packing[:2], out, lse)

    def call(config: triton_tuning.Config) -> None:
        block_m, block_n, warps, stages, specialized = config
        blocks = cdiv(seq_q, block_m)
        run = with_memory(specialized_forward_kernel) if specialized else forward_kernel
        run(
            (blocks * items, 1, 1),
            tensors,
            (seq_q, seq_k, heads, heads_per_kv, blocks, items, group, *at, *size.of_lse(q), *option_numbers(options)),
            (even, *constants(options, dim, dim_v), block_m, block_n),
            warps,
            num_stages=stages,
        )

    shape = (items, seq_q, seq_k, options.left, options.right)
    triton_tuning.launch("forward", q, v, options, shape, call, (out, lse), lambda: can_specialize(q, k, v))
