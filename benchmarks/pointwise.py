"""rope and swiglu, beside a copy.

Bytes that must move: rope one read and one write of q and k; swiglu forward two reads and a write, forward and
backward five reads and three writes of [rows, hidden]. The copy reads and writes q and k, or allocates and writes as
many tensors as swiglu does, 1 or 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import rope, swiglu

from . import peers
from .cases import COPY, Call, Case, Scale, baselines, ours, short, step_of
from .timing import DEVICE


def cases(scale: Scale) -> Iterator[Case]:
    heads = scale.pick((8, 4096, 32, 8, 128), (2, 2048, 16, 4, 128), (1, 1024, 16, 4, 128))
    rows = scale.pick((16384, 11008), (2048, 5632), (1024, 5632))
    for dtype in scale.dtypes:
        yield _rope(*heads, dtype)
    for dtype in scale.dtypes:
        for backward in scale.directions:
            yield _swiglu(rows, dtype, backward)


def copies(*tensors: Tensor) -> list[Tensor]:
    return [t.clone() for t in tensors]


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As models write it (transformers' Llama); cos and sin repeated for both halves, in the dtype."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def _rope(batch: int, seq: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    in_place = {f"{name}, in place": op for name, op in ours(rope, inplace=True).items()}
    ops = ours(rope) | in_place

    def build() -> dict[str, Call]:
        q, k = (torch.randn(batch, seq, h, dim, dtype=dtype, device=DEVICE) for h in (heads, kv_heads))
        angle = torch.randn(seq, dim // 2, device=DEVICE)
        tables = [t.to(dtype).repeat(1, 2).unsqueeze(1) for t in (angle.cos(), angle.sin())]
        calls: dict[str, Call] = {COPY: partial(copies, q, k)}
        calls |= {name: partial(op, q, k, *tables) for name, op in baselines(eager_rope).items()}
        return calls | {name: partial(op, q, k, angle.cos(), angle.sin()) for name, op in ops.items()}

    moved = 2 * batch * seq * (heads + kv_heads) * dim * dtype.itemsize
    names = (COPY, *baselines(eager_rope), *ops)
    size = f"{batch}×{seq}×({heads}+{kv_heads})×{dim}"
    return Case("rope", size, "forward", short(dtype), moved, "GB/s", names, build)


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    names = (COPY, *baselines(eager_swiglu), *ours(swiglu), *peers.swiglu())

    def build() -> dict[str, Call]:
        gate, up, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))
        copy = partial(copies, gate, up, g) if backward else gate.clone
        ops = baselines(eager_swiglu) | ours(swiglu) | peers.swiglu()
        return {COPY: copy} | {name: step_of(op, [gate, up], g if backward else None) for name, op in ops.items()}

    moved = (8 if backward else 3) * shape[0] * shape[1] * dtype.itemsize
    direction = "forward+backward" if backward else "forward"
    return Case("swiglu", f"{shape[0]}×{shape[1]}", direction, short(dtype), moved, "GB/s", names, build)
