"""Flash attention in Triton, forward (Dao, 2023, https://arxiv.org/abs/2307.08691).

Compute-bound: the floor is 4·dim operations per visible pair of query and key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import on_device
from . import triton_tuning
from .options import Options
from .packing import Packing
from .triton_tiles import (
    LN2,
    LOG2E,
    NOT_SPECIALIZED,
    batch_stride,
    common_arguments,
    fuses_scale,
    group_size,
    key_stages,
    load_rows,
    logits,
    sequence,
    shape_class,
    sizes,
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    Q, K, V, SINKS, CU_Q, CU_K, OUT, LSE,
    seq_q, seq_k, heads, heads_per_kv, blocks, items, group_size,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, o_batch, lse_batch, lse_head,
    scale, softcap, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
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
    Q += batch * q_batch + first_q * q_seq + head * tl.cast(q_head, tl.int64)
    K += batch * k_batch + first_k * k_seq + head // heads_per_kv * tl.cast(k_head, tl.int64)
    V += batch * v_batch + first_k * v_seq + head // heads_per_kv * tl.cast(v_head, tl.int64)
    q = load_rows(Q, row, q_seq, seq_q, True, DIM, BLOCK_M, BLOCK_D)
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
    OUT += batch * o_batch + first_q * (heads * DIM_V) + head * DIM_V
    store_rows(OUT, acc, row, heads * DIM_V, seq_q, DIM_V, BLOCK_M, BLOCK_V)
    tl.store(
        LSE + batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q + rows,
        (row_max + tl.log2(row_sum)) * LN2,
        rows < seq_q,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    backend: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    size = sizes(q, k, v, packing)
    items, bytes_per_token = size.sequences * size.heads, (size.dim + size.dim_v) * k.element_size()
    given = common_arguments(q, k, v, lse, packing, options, size)

    def call(config: triton_tuning.Config) -> None:
        blocks = triton.cdiv(size.seq_q, config["BLOCK_M"])
        forward_kernel[(blocks * items,)](
            SINKS=sinks,
            OUT=out,
            blocks=blocks,
            items=items,
            group_size=group_size(size.seq_k, bytes_per_token, size.heads_per_kv, items),
            o_batch=batch_stride(out),
            FUSE_SCALE=fuses_scale(options),
            **given,
            **config,
        )

    shape = shape_class(items, size.seq_q, size.seq_k, options.left, options.right)
    with on_device(q):
        triton_tuning.launch("forward", q, v, options, shape, call)
