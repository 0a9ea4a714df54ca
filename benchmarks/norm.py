"""RMSNorm, beside a copy of what must be written.

Bytes that must move, in tensors of [rows, columns]: forward 2 (read x, write y); forward and backward 5 (read x, write
y; read dy and x, write dx). The copy allocates and writes as many tensors as the op does, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import rms_norm

from . import peers
from .cases import COPY, Call, Case, Scale, baselines, ours, short, step_of
from .timing import DEVICE

COPIED = 2**24  # elements of a point of the sweep over columns: as much to do for each


def cases(scale: Scale) -> Iterator[Case]:
    shapes = scale.pick([(32768, 4096), (8192, 16384), (4096, 65536)], [(4096, 2048), (4096, 4096)], [(2048, 2048)])
    for shape in shapes:
        for dtype in scale.dtypes:
            for backward in scale.directions:
                yield _case(shape, dtype, backward)
    if not scale.quick:
        for columns in scale.pick([2**n for n in range(9, 18)], [2**n for n in range(7, 15)], []):
            yield _case((COPIED // columns, columns), torch.bfloat16, True, sweep=True)


def eager(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def _case(shape: tuple[int, int], dtype: torch.dtype, backward: bool, sweep: bool = False) -> Case:
    compiled = not sweep  # a compilation for each point is too slow
    names = (COPY, *baselines(eager, compiled=compiled), *ours(rms_norm), *peers.rms_norm())
    size = shape[0] * shape[1] * dtype.itemsize

    def build() -> dict[str, Call]:
        x, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        w = torch.ones(shape[1], dtype=dtype, device=DEVICE)
        copy = (lambda: (x.clone(), g.clone())) if backward else x.clone
        ops = baselines(eager, compiled=compiled) | ours(rms_norm) | peers.rms_norm()
        return {COPY: copy} | {name: step_of(op, [x, w], g if backward else None) for name, op in ops.items()}

    return Case(
        "rms_norm", f"{shape[0]}×{shape[1]}", "forward+backward" if backward else "forward", short(dtype),
        (5 if backward else 2) * size, "GB/s", names, build, "columns" if sweep else "", shape[1] if sweep else 0,
    )  # fmt: skip
