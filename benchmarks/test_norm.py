"""RMSNorm: PyTorch eager, torch.compile and each backend, beside a copy of what must be written.

Bytes that must move, in tensors of [rows, cols]: forward 2 (read x, write y); forward and backward 5 (read
x, write y; read dy and x, write dx). The copy allocates and writes as many tensors as the op does, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import DEVICE
from fastllm.kernels import backends, rms_norm

SHAPES = (
    [(32768, 4096), (32768, 8192), (8192, 16384), (4096, 65536)]
    if DEVICE.type == "cuda"
    else [(4096, 2048), (4096, 4096)]
)
DTYPES = [torch.bfloat16, torch.float32]
KERNELS = [
    b for b in ("triton", "cuda", "cpu") if not backends.device_limit(b, DEVICE) and not backends.TRITON_INTERPRET
]


def eager(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def implementation(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "eager":
        return eager
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(eager)
    return lambda x, w: rms_norm(x, w, backend=name)


@pytest.mark.parametrize("name", ["copy", "eager", "compile", *KERNELS])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_rms_norm(measure: Any, shape: tuple[int, int], dtype: torch.dtype, backward: bool, name: str) -> None:
    x, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    w = torch.ones(shape[1], dtype=dtype, device=DEVICE)
    size = x.numel() * x.element_size()
    if name == "copy":
        call, moved = (lambda: (x.clone(), g.clone())) if backward else x.clone, (4 if backward else 2) * size
    else:
        norm, moved = implementation(name), (5 if backward else 2) * size
        x.requires_grad_(backward)
        w.requires_grad_(backward)

        def call() -> None:
            y = norm(x, w)
            if backward:
                x.grad = w.grad = None
                y.backward(g)

    direction = "forward+backward" if backward else "forward"
    case = f"rms_norm {direction} {shape[0]}×{shape[1]} {str(dtype).removeprefix('torch.')}"
    measure(call, case=case, implementation=name, bytes=moved)
