"""Flash attention in Triton, forward (Dao, 2023, https://arxiv.org/abs/2307.08691).

Compute-bound: the floor is 4·dim operations per visible pair of query and key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import on_device
from . import triton_tuning
from .triton_tiles import (
    LN2,
    LOG2E,
    NOT_SPECIALIZED,
    document,
    key_stages,
    load_rows,
    logits,
    padded,
    scales,
    section,
    shape_class,
    store_rows,
    strides,
    visible,
    work_of,
)


@triton.jit
def attend(
    acc, total, top, q, K, V, k_seq, v_seq, position, begin, end, seq_k, scale, softcap, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of q over the keys from begin to end."""
    for start in tl.range(begin, end, BLOCK_N):
        k = load_rows(K, start, k_seq, seq_k, MASKED, DIM, BLOCK_N, BLOCK_D)
        if FOLD and not MASKED:  # one multiply-add scales and subtracts
            s = tl.dot(q, k.T, input_precision="ieee")
            new = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new[:, None])
            alpha = tl.exp2(top - new)
        else:
            s = logits(q, k.T, scale, softcap, SOFTCAP)
            if MASKED:
                key = start + tl.arange(0, BLOCK_N)
                s = tl.where(visible(position[:, None], key[None, :], seq_k, window, CAUSAL, WINDOW), s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(top - base)
        v = load_rows(V, start, v_seq, seq_k, MASKED, DIM, BLOCK_N, BLOCK_D)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = new
    return acc, total, top


@triton.jit
def attend_stages(
    acc, total, top, q, K, V, k_seq, v_seq, position, begin, full, edge, end, seq_k, scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if WINDOW:
        acc, total, top = attend(
            acc, total, top, q, K, V, k_seq, v_seq, position, begin, tl.minimum(full, end), seq_k, scale, softcap,
            window, True, CAUSAL, WINDOW, SOFTCAP, FOLD, DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, q, K, V, k_seq, v_seq, position, full, edge, seq_k, scale, softcap, window,
        False, CAUSAL, WINDOW, SOFTCAP, FOLD, DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return attend(
        acc, total, top, q, K, V, k_seq, v_seq, position, edge, end, seq_k, scale, softcap, window,
        True, CAUSAL, WINDOW, SOFTCAP, FOLD, DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    Q, K, V, SINKS, CU_Q, CU_K, OUT, LSE,
    seq_q, seq_k, heads, group, blocks, total, section,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, o_batch, lse_batch, lse_head,
    scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, item = work_of(blocks, total, section)
    batch, head = tl.cast(item // heads, tl.int64), item % heads
    first_q, seq_q = document(CU_Q, batch, seq_q)
    first_k, seq_k = document(CU_K, batch, seq_k)
    row = (blocks - 1 - block) * BLOCK_M  # longest first
    if row >= seq_q:
        return
    Q += batch * q_batch + first_q * q_seq + head * tl.cast(q_head, tl.int64)
    K += batch * k_batch + first_k * k_seq + head // group * tl.cast(k_head, tl.int64)
    V += batch * v_batch + first_k * v_seq + head // group * tl.cast(v_head, tl.int64)
    q = load_rows(Q, row, q_seq, seq_q, True, DIM, BLOCK_M, BLOCK_D)
    rows = row + tl.arange(0, BLOCK_M)
    shift = seq_k - seq_q
    begin, full, edge, end = key_stages(
        row + shift, tl.minimum(row + BLOCK_M, seq_q) - 1 + shift, seq_k, window, CAUSAL, WINDOW, BLOCK_N
    )
    sink = tl.full([], float("-inf"), tl.float32)
    if SINKS is not None:
        sink = tl.load(SINKS + head) * LOG2E
    top = tl.zeros([BLOCK_M], tl.float32) + sink
    summed = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, summed, top = attend_stages(
        acc, summed, top, q, K, V, k_seq, v_seq, rows + shift, begin, full, edge, end, seq_k, scale, softcap, window,
        CAUSAL, WINDOW, SOFTCAP, FOLD, DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = acc / tl.where(summed == 0.0, 1.0, summed)[:, None]
    OUT += batch * o_batch + first_q * (heads * DIM) + head * DIM
    store_rows(OUT, acc, row, heads * DIM, seq_q, DIM, BLOCK_M, BLOCK_D)
    tl.store(
        LSE + batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q + rows,
        (top + tl.log2(summed)) * LN2,
        rows < seq_q,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> None:
    packed = cu_seqlens_q is not None
    (tokens, heads, dim), group = q.shape[-3:], q.shape[-2] // k.shape[-2]
    total = heads * (len(cu_seqlens_q) - 1 if packed else q.shape[0])
    if total * max_seqlen_q == 0:
        return
    at_once = section(max_seqlen_k, 2 * dim * k.element_size(), group, total)
    lse_strides = (0, tokens) if packed else (heads * tokens, tokens)

    def call(config: triton_tuning.Config) -> None:
        blocks = triton.cdiv(max_seqlen_q, config["BLOCK_M"])
        forward_kernel[(blocks * total,)](
            q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, out, lse,
            max_seqlen_q, max_seqlen_k, heads, group, blocks, total, at_once,
            *strides(q, packed), *strides(k, packed), *strides(v, packed), strides(out, packed)[0], *lse_strides,
            *scales(scale, softcap), window,
            CAUSAL=causal, WINDOW=window > 0, SOFTCAP=softcap > 0, FOLD=scale > 0 and softcap == 0,
            DIM=dim, BLOCK_D=padded(dim), **config,
        )  # fmt: skip

    shape = shape_class(total, max_seqlen_q, max_seqlen_k, causal, window)
    with on_device(q):
        triton_tuning.launch("forward", q, padded(dim), window > 0 or softcap > 0, shape, call)
