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


UNPACKED = Packing(None, None, 0, 0)


def check_packing(q: Tensor, k: Tensor, packing: Packing) -> None:
    """Raise where sequences don't follow one another through all tokens, or are longer than their max_seqlen: always on
    a CPU; on a GPU, which must be waited for, with FASTLLM_DEBUG=1."""
    if packing.cu_seqlens_q is None or (q.device.type != "cpu" and not DEBUG):
        return
    for side, cu, most, x in zip("qk", packing[:2], packing[2:], (q, k), strict=True):
        name, ends, tokens = f"cu_seqlens_{side}", cu.tolist(), x.shape[0]
        if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
            raise ValueError(
                f"flash_attention: {name} must rise from 0 to the {tokens} tokens, it is {ends[:4]} … {ends[-2:]}"
            )
        longest = max((b - a for a, b in pairwise(ends)), default=0)
        if 0 < most < longest:
            raise ValueError(
                f"flash_attention: max_seqlen_{side} must be at least the longest sequence, {longest}, not {most}"
            )


def longest(x: Tensor, cu_seqlens: Tensor | None, given: int) -> int:
    """The longest sequence of x; without a hint for packed sequences the GPU must be waited for."""
    if cu_seqlens is None:
        return x.shape[1]
    return int(given) or (int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0)
