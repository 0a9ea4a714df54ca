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
from .triton_forward import attend_stages
from .triton_tiles import LN2, LOG2E, key_stages, padded, scales, shape_class

PROGRAMS = 2  # of a multiprocessor, which hide each other's waits
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["seq_q", "seq_k", "row_blocks", "splits", "window"])
def decode_kernel(
    Q, K, V, SINKS, LENGTHS, OUT, LSE,
    seq_q, seq_k, heads, group, row_blocks, splits,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, out_split, lse_split,
    scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT and LSE have one part per split, each as if its keys were all."""
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_heads = heads // group
    item, block = block // row_blocks, block % row_blocks
    batch, kv_head = tl.cast(item // kv_heads, tl.int64), item % kv_heads
    if LENGTHS is not None:
        seq_k = tl.minimum(tl.maximum(tl.load(LENGTHS + batch), 0), seq_k).to(tl.int32)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // group, kv_head * group + row % group
    inside = (query < seq_q)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    at = batch * q_batch + query.to(tl.int64) * q_seq + head.to(tl.int64) * q_head
    q = tl.load(Q + at[:, None] + col, inside & (col < DIM), other=0.0)
    K += batch * k_batch + kv_head * tl.cast(k_head, tl.int64)
    V += batch * v_batch + kv_head * tl.cast(v_head, tl.int64)
    shift = seq_k - seq_q
    lowest = block * BLOCK_M // group
    highest = tl.minimum(((block + 1) * BLOCK_M - 1) // group, seq_q - 1)
    begin, full, edge, end = key_stages(lowest + shift, highest + shift, seq_k, window, CAUSAL, WINDOW, BLOCK_N)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)
    full = tl.minimum(tl.maximum(full, begin), tl.maximum(end, begin))
    edge = tl.maximum(tl.minimum(edge, end), full)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS is not None:  # noqa: SIM102 (one is known when compiling)
        if split == 0:
            top = tl.load(SINKS + head, query < seq_q, other=0.0) * LOG2E
    summed = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, summed, top = attend_stages(
        acc, summed, top, q, K, V, k_seq, v_seq, query + shift, begin, full, edge, end, seq_k, scale, softcap, window,
        CAUSAL, WINDOW, SOFTCAP, FOLD, DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc / tl.where(summed == 0.0, 1.0, summed)[:, None]
    OUT += split * out_split + ((batch * seq_q + query) * heads + head)[:, None] * DIM
    tl.store(OUT + col, acc.to(OUT.dtype.element_ty), inside & (col < DIM))
    LSE += split * lse_split + (batch * heads + head) * seq_q
    tl.store(LSE + query, (top + tl.log2(summed)) * LN2, query < seq_q)


@triton.jit
def combine_kernel(
    PARTS, PART_LSE, OUT, LSE, seq_q, heads, splits, out_split, lse_split,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of a row, each weighted by its share of the sum of exponentials."""
    row = tl.program_id(0).to(tl.int64)  # [batch, query, head]
    query, head = row // heads % seq_q, row % heads
    split, col = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)[None, :]
    at = (row // heads // seq_q * heads + head) * seq_q + query
    lse = tl.load(PART_LSE + split * lse_split + at, split < splits, other=float("-inf")) * LOG2E
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    summed = tl.sum(weight, 0)
    tile = split[:, None].to(tl.int64) * out_split + row * DIM + col
    parts = tl.load(PARTS + tile, (split < splits)[:, None] & (col < DIM), other=0.0)
    out = tl.sum(parts * weight[:, None], 0, keep_dims=True) / tl.where(summed == 0.0, 1.0, summed)
    tl.store(OUT + row * DIM + col, out.to(OUT.dtype.element_ty), col < DIM)
    tl.store(LSE + at, (top + tl.log2(summed)) * LN2)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> None:
    (batch, seq_q, heads, dim), (_, capacity, kv_heads, _) = q.shape, k.shape
    rows = seq_q * (heads // kv_heads)
    if batch * rows == 0:
        return
    most_keys = min(capacity, window + seq_q - 1) if window else capacity
    dims = {"DIM": dim, "BLOCK_D": padded(dim)}

    def call(config: triton_tuning.Config) -> None:
        block = min(config["BLOCK_M"], max(16, triton.next_power_of_2(rows)))
        row_blocks = triton.cdiv(rows, block)
        programs, blocks = batch * kv_heads * row_blocks, triton.cdiv(most_keys, config["BLOCK_N"])
        splits = max(1, min(PROGRAMS * processors(q.device) // programs, blocks, MOST_SPLITS))
        parts, part_lse = out, lse
        if splits > 1:
            parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
            part_lse = lse.new_empty((splits, *lse.shape))
        decode_kernel[(programs * splits,)](
            q, k, v, sinks, seqlens_k, parts, part_lse,
            seq_q, capacity, heads, heads // kv_heads, row_blocks, splits,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.numel(), lse.numel(),
            *scales(scale, softcap), window,
            CAUSAL=causal, WINDOW=window > 0, SOFTCAP=softcap > 0, FOLD=scale > 0 and softcap == 0, **dims,
            **config | {"BLOCK_M": block},
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(lse.numel(),)](
                parts, part_lse, out, lse, seq_q, heads, splits, out.numel(), lse.numel(),
                **dims, SPLITS=triton.next_power_of_2(splits),
            )  # fmt: skip

    shape = shape_class(batch * kv_heads, rows, capacity, causal, window)
    with on_device(q):
        triton_tuning.launch("decode", q, padded(dim), window > 0 or softcap > 0, shape, call)
