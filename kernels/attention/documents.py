"""Packed documents: where they begin and end."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..checks import DEBUG


def check_documents(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Raise where documents don't follow one another through all tokens: always on a CPU; on a GPU, which must be
    waited for, with FASTLLM_DEBUG=1."""
    if cu_seqlens_q is None or (q.device.type != "cpu" and not DEBUG):
        return
    for name, cu, tokens in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
            raise ValueError(
                f"flash_attention: {name} must rise from 0 to the {tokens} tokens, it is {ends[:4]} … {ends[-2:]}"
            )


def longest(x: Tensor, cu_seqlens: Tensor | None, given: int) -> int:
    """The longest sequence of x; without a hint for packed documents the GPU must be waited for."""
    if cu_seqlens is None:
        return x.shape[1]
    return given or (int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0)
