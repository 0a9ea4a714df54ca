"""Flash-Decoding in Triton: the keys of a sequence split over programs, and a kernel that combines their results.

Memory-bound: the floor is one read of the keys and values that are seen. The rows of a tile are all queries
of all heads that share a key.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, cdiv, multiple, power_of_two, processors
from . import triton_tuning
from .options import Options
from .triton_forward import attend_stages
from .triton_paged import attention_paged
from .triton_tiles import LN2, LOG2E, constants, key_stages, option_numbers, padded, places, start_of

PROGRAMS = 2  # of a multiprocessor, which hide each other's waits
FEW_SPLITS, MOST_SPLITS = 8, 64


@Kernel
def decode_kernel(
    Q, K, V, SINKS, LENGTHS, OUT, LSE,
    seq_q, seq_k, heads, heads_per_kv, row_blocks, splits,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, rows,
    scale, softcap, left, right,
    ALIGNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT and LSE have one part per split, of ``rows``, each as if its keys were all."""
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_heads = heads // heads_per_kv
    item, block = block // row_blocks, block % row_blocks
    batch, kv_head = tl.cast(item // kv_heads, tl.int64), item % kv_heads
    if LENGTHS is not None:
        seq_k = tl.minimum(tl.maximum(tl.load(LENGTHS + batch), 0), seq_k).to(tl.int32)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // heads_per_kv, kv_head * heads_per_kv + row % heads_per_kv
    inside = (query < seq_q)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    offsets = query.to(tl.int64) * multiple(q_seq, ALIGNED) + head.to(tl.int64) * multiple(q_head, ALIGNED)
    Q += batch * multiple(q_batch, ALIGNED)
    q = tl.load(Q + offsets[:, None] + col, inside & (col < DIM), other=0.0)
    K = start_of(K, batch, 0, kv_head, k_batch, k_seq, k_head, ALIGNED)
    V = start_of(V, batch, 0, kv_head, v_batch, v_seq, v_head, ALIGNED)
    k_seq, v_seq = multiple(k_seq, ALIGNED), multiple(v_seq, ALIGNED)
    shift = seq_k - seq_q
    lowest = block * BLOCK_M // heads_per_kv
    highest = tl.minimum(((block + 1) * BLOCK_M - 1) // heads_per_kv, seq_q - 1)
    begin, full, edge, end = key_stages(lowest + shift, highest + shift, seq_k, left, right, LEFT, RIGHT, BLOCK_N)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)
    full = tl.minimum(tl.maximum(full, begin), tl.maximum(end, begin))
    edge = tl.maximum(tl.minimum(edge, end), full)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS is not None:  # noqa: SIM102 (one is known when compiling)
        if split == 0:
            row_max = tl.load(SINKS + head, query < seq_q, other=0.0) * LOG2E
    row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc, row_sum, row_max = attend_stages(
        acc, row_sum, row_max, q, K, V, k_seq, v_seq, query + shift, begin, full, edge, end, seq_k, scale, softcap,
        left, right, LEFT, RIGHT, SOFTCAP, FUSE_SCALE, DIM, DIM_V, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    first = split.to(tl.int64) * rows
    OUT += (first + (batch * seq_q + query) * heads + head)[:, None] * DIM_V
    col_v = tl.arange(0, BLOCK_V)[None, :]
    tl.store(OUT + col_v, acc.to(OUT.dtype.element_ty), inside & (col_v < DIM_V))
    if LSE is not None:
        LSE += first + (batch * heads + head) * seq_q
        tl.store(LSE + query, (row_max + tl.log2(row_sum)) * LN2, query < seq_q)


@Kernel
def combine_kernel(
    PARTS, PART_LSE, OUT, LSE, seq_q, heads, splits, rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of a row, each weighted by its share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)  # [batch, query, head]
    query, head = row // heads % seq_q, row % heads
    split, col = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)[None, :]
    lse_offset = (row // heads // seq_q * heads + head) * seq_q + query
    lse = tl.load(PART_LSE + split.to(tl.int64) * rows + lse_offset, split < splits, other=float("-inf")) * LOG2E
    row_max = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(row_max == float("-inf"), 0.0, row_max))
    row_sum = tl.sum(weight, 0)
    offsets = (split[:, None].to(tl.int64) * rows + row) * DIM + col
    parts = tl.load(PARTS + offsets, (split < splits)[:, None] & (col < DIM), other=0.0)
    out = tl.sum(parts * weight[:, None], 0, keep_dims=True) / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(OUT + row * DIM + col, out.to(OUT.dtype.element_ty), col < DIM)
    if LSE is not None:
        tl.store(LSE + lse_offset, (row_max + tl.log2(row_sum)) * LN2)


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    if block_table is not None and seqlens_k is not None:
        attention_paged(q, k, v, seqlens_k, block_table, sinks, options, out, lse)
        return
    (batch, seq_q, heads, dim), (_, capacity, kv_heads, _) = q.shape, k.shape
    heads_per_kv, dim_v = heads // kv_heads, v.shape[-1]
    group_rows = seq_q * heads_per_kv
    most_keys = min(capacity, options.left + options.right + seq_q)
    rows = batch * seq_q * heads
    at, even = places(q, k, v)

    def call(config: triton_tuning.Config) -> None:
        block_m, block_n, warps, stages, _ = config
        block_m = min(block_m, max(16, power_of_two(group_rows)))
        row_blocks = cdiv(group_rows, block_m)
        programs, blocks = batch * kv_heads * row_blocks, cdiv(most_keys, block_n)
        splits = max(1, min(PROGRAMS * processors(q.device) // programs, blocks, MOST_SPLITS))
        parts, part_lse = out, lse
        if splits > 1:
            parts = torch.empty(splits, rows, dim_v, dtype=torch.float32, device=q.device)
            part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
        decode_kernel(
            (programs * splits, 1, 1),
            (q, k, v, sinks, seqlens_k, parts, part_lse),
            (seq_q, capacity, heads, heads_per_kv, row_blocks, splits, *at, rows, *option_numbers(options)),
            (even, *constants(options, dim, dim_v), block_m, block_n),
            warps,
            num_stages=stages,
        )
        if splits > 1:
            combine_kernel(
                (rows, 1, 1),
                (parts, part_lse, out, lse),
                (seq_q, heads, splits, rows),
                (dim_v, padded(dim_v), FEW_SPLITS if splits <= FEW_SPLITS else MOST_SPLITS),
            )

    shape = (batch * kv_heads, group_rows, capacity, options.left, options.right)
    triton_tuning.launch("decode", q, v, options, shape, call, (out, lse))
