"""Packed sequences: where they begin and end."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..checks import DEBUG
from ..library import Size


class Packing(NamedTuple):
    """Without cu_seqlens the tensors have a batch dimension; a max_seqlen of 0 is unknown."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: Size
    max_seqlen_k: Size


def check_packing(q: Tensor, k: Tensor, packing: Packing) -> None:
    """Raise where sequences don't follow one another through all tokens: always on a CPU; on a GPU, which must be
    waited for, with FASTLLM_DEBUG=1."""
    if packing.cu_seqlens_q is None or (q.device.type != "cpu" and not DEBUG):
        return
    for name, cu, x in zip(("cu_seqlens_q", "cu_seqlens_k"), packing[:2], (q, k), strict=True):
        ends, tokens = cu.tolist(), x.shape[0]
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
            raise ValueError(
                f"flash_attention: {name} must rise from 0 to the {tokens} tokens, it is {ends[:4]} … {ends[-2:]}"
            )


def longest(x: Tensor, cu_seqlens: Tensor | None, given: int) -> int:
    """The longest sequence of x; without a hint for packed sequences the GPU must be waited for."""
    if cu_seqlens is None:
        return x.shape[1]
    return given or (int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0)
