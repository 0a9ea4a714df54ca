"""rope and swiglu: PyTorch eager, torch.compile and each backend, beside a copy.

Bytes that must move: rope one read and one write of q and k; swiglu forward two reads and a write, forward and
backward five reads and three writes of [rows, hidden]. The copy reads and writes q and k, or allocates and writes as
many tensors as swiglu does, 1 or 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import DEVICE
from fastllm.kernels import backends, rope, swiglu

ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.bfloat16, torch.float32]
KERNELS = [
    b for b in ("triton", "cuda", "cpu") if not backends.device_limit(b, DEVICE) and not backends.TRITON_INTERPRET
]
NAMES = ["copy", "eager", "compile", *KERNELS]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copies(*tensors: Tensor) -> list[Tensor]:
    return [t.clone() for t in tensors]


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As models write it (transformers' Llama); cos and sin repeated for both halves, in the dtype."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def pick(name: str, eager: Any, ours: Any) -> Any:
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(eager)
    return eager if name == "eager" else partial(ours, backend=name)


@pytest.mark.parametrize("name", [*NAMES, *(f"{b}, in place" for b in KERNELS)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rope(measure: Any, dtype: torch.dtype, name: str) -> None:
    batch, seq, heads, kv_heads, dim = (8, 4096, 32, 8, 128) if ON_GPU else (2, 2048, 16, 4, 128)
    q, k = (torch.randn(batch, seq, h, dim, dtype=dtype, device=DEVICE) for h in (heads, kv_heads))
    angle = torch.randn(seq, dim // 2, device=DEVICE)
    backend, _, in_place = name.partition(", ")
    if name == "copy":
        call = partial(copies, q, k)
    elif name in ("eager", "compile"):
        tables = [t.to(dtype).repeat(1, 2).unsqueeze(1) for t in (angle.cos(), angle.sin())]
        call = partial(pick(name, eager_rope, rope), q, k, *tables)
    else:
        call = partial(rope, q, k, angle.cos(), angle.sin(), inplace=bool(in_place), backend=backend)
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    case = f"rope {batch}×{seq}×({heads}+{kv_heads})×{dim} {short(dtype)}"
    with torch.no_grad():
        measure(call, case=case, implementation=name, bytes=moved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_swiglu(measure: Any, dtype: torch.dtype, backward: bool, name: str) -> None:
    shape = (16384, 11008) if ON_GPU else (2048, 5632)
    gate, up, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3))
    size = gate.numel() * gate.element_size()
    if name == "copy":
        call, moved = (partial(copies, gate, up, g), 6) if backward else (gate.clone, 2)
    else:
        op, moved = pick(name, lambda a, b: F.silu(a) * b, swiglu), 8 if backward else 3
        gate.requires_grad_(backward)
        up.requires_grad_(backward)

        def call() -> None:
            out = op(gate, up)
            if backward:
                gate.grad = up.grad = None
                out.backward(g)

    direction = "forward+backward" if backward else "forward"
    case = f"swiglu {direction} {shape[0]}×{shape[1]} {short(dtype)}"
    measure(call, case=case, implementation=name, bytes=moved * size)
