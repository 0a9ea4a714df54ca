"""Flash-Decoding in Triton: the keys of a sequence split over programs, and a kernel that combines their results.

Memory-bound: the floor is one read of the keys and values that are seen. The rows of a tile are all queries
of all heads that share a key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import on_device, processors
from . import triton_tuning
from .options import Options
from .triton_forward import attend_stages
from .triton_tiles import LN2, LOG2E, fuses_scale, head_strides, key_stages, option_arguments, padded, shape_class

PROGRAMS = 2  # of a multiprocessor, which hide each other's waits
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["seq_q", "seq_k", "row_blocks", "splits", "left", "right"])
def decode_kernel(
    Q, K, V, SINKS, LENGTHS, OUT, LSE,
    seq_q, seq_k, heads, heads_per_kv, row_blocks, splits,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, out_split, lse_split,
    scale, softcap, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FUSE_SCALE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT and LSE have one part per split, each as if its keys were all."""
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
    offsets = batch * q_batch + query.to(tl.int64) * q_seq + head.to(tl.int64) * q_head
    q = tl.load(Q + offsets[:, None] + col, inside & (col < DIM), other=0.0)
    K += batch * k_batch + kv_head * tl.cast(k_head, tl.int64)
    V += batch * v_batch + kv_head * tl.cast(v_head, tl.int64)
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
    OUT += split * out_split + ((batch * seq_q + query) * heads + head)[:, None] * DIM_V
    col_v = tl.arange(0, BLOCK_V)[None, :]
    tl.store(OUT + col_v, acc.to(OUT.dtype.element_ty), inside & (col_v < DIM_V))
    LSE += split * lse_split + (batch * heads + head) * seq_q
    tl.store(LSE + query, (row_max + tl.log2(row_sum)) * LN2, query < seq_q)


@triton.jit
def combine_kernel(
    PARTS, PART_LSE, OUT, LSE, seq_q, heads, splits, out_split, lse_split,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of a row, each weighted by its share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)  # [batch, query, head]
    query, head = row // heads % seq_q, row % heads
    split, col = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)[None, :]
    lse_offset = (row // heads // seq_q * heads + head) * seq_q + query
    lse = tl.load(PART_LSE + split * lse_split + lse_offset, split < splits, other=float("-inf")) * LOG2E
    row_max = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(row_max == float("-inf"), 0.0, row_max))
    row_sum = tl.sum(weight, 0)
    offsets = split[:, None].to(tl.int64) * out_split + row * DIM + col
    parts = tl.load(PARTS + offsets, (split < splits)[:, None] & (col < DIM), other=0.0)
    out = tl.sum(parts * weight[:, None], 0, keep_dims=True) / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(OUT + row * DIM + col, out.to(OUT.dtype.element_ty), col < DIM)
    tl.store(LSE + lse_offset, (row_max + tl.log2(row_sum)) * LN2)


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    options: Options,
    backend: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    (batch, seq_q, heads, dim), (_, capacity, kv_heads, _) = q.shape, k.shape
    rows, dim_v = seq_q * (heads // kv_heads), v.shape[-1]
    most_keys = min(capacity, options.left + options.right + seq_q)

    def call(config: triton_tuning.Config) -> None:
        block = min(config["BLOCK_M"], max(16, triton.next_power_of_2(rows)))
        row_blocks = triton.cdiv(rows, block)
        programs, blocks = batch * kv_heads * row_blocks, triton.cdiv(most_keys, config["BLOCK_N"])
        splits = max(1, min(PROGRAMS * processors(q.device) // programs, blocks, MOST_SPLITS))
        parts, part_lse = out, lse
        if splits > 1:
            parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
            part_lse = lse.new_empty((splits, *lse.shape))
        given = {
            "seq_q": seq_q,
            "heads": heads,
            "splits": splits,
            "out_split": out.numel(),
            "lse_split": lse.numel(),
        }
        decode_kernel[(programs * splits,)](
            Q=q,
            K=k,
            V=v,
            SINKS=sinks,
            LENGTHS=seqlens_k,
            OUT=parts,
            LSE=part_lse,
            seq_k=capacity,
            heads_per_kv=heads // kv_heads,
            row_blocks=row_blocks,
            FUSE_SCALE=fuses_scale(options),
            **given,
            **head_strides(q=q, k=k, v=v),
            **option_arguments(options, dim, dim_v),
            **config | {"BLOCK_M": block},
        )
        if splits > 1:
            combine_kernel[(lse.numel(),)](
                PARTS=parts,
                PART_LSE=part_lse,
                OUT=out,
                LSE=lse,
                DIM=dim_v,
                BLOCK_D=padded(dim_v),
                SPLITS=triton.next_power_of_2(splits),
                **given,
            )

    shape = shape_class(batch * kv_heads, rows, capacity, options.left, options.right)
    with on_device(q):
        triton_tuning.launch("decode", q, v, options, shape, call)
