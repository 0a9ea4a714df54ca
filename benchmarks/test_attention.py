"""Attention and decoding: PyTorch's scaled_dot_product_attention and each backend.

Bound by arithmetic: 4 · batch · heads · dim operations for each query and key that it sees (half of all, if causal),
and 3.5 times as many forward and backward (the scores are computed twice). Decoding is bound by one read of the keys
and values. "eager" is what PyTorch chooses; on a GPU its kernels are also timed by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import DEVICE
from fastllm.kernels import backends, flash_attention, flash_decode

ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.bfloat16] if ON_GPU else [torch.bfloat16, torch.float32]
# batch, heads, tokens, head dimension; on a GPU 16k tokens in all, the sizes of FlashAttention's papers
SHAPES = (
    [(16384 // n, 2048 // d, n, d) for d in (64, 128) for n in (512, 1024, 2048, 4096, 8192, 16384)]
    if ON_GPU
    else [(2, 12, 1024, 64), (1, 8, 4096, 128)]
)
PYTORCH = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION} if ON_GPU else {}
KERNELS = [b for b in ("triton", "cpu") if not backends.device_limit(b, DEVICE) and not backends.TRITON_INTERPRET]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def implementation(name: str) -> tuple[Callable[..., Tensor], bool]:
    """The call, and whether it wants heads before tokens."""
    if name in KERNELS:
        return partial(flash_attention, backend=name), False
    call = partial(F.scaled_dot_product_attention, is_causal=True)
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(call), True
    return call, True


@pytest.mark.parametrize("name", ["eager", *PYTORCH, "compile", *KERNELS])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_causal_attention(
    measure: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, name: str
) -> None:
    batch, heads, seq, dim = shape
    op, heads_first = implementation(name)
    size = (batch, heads, seq, dim) if heads_first else (batch, seq, heads, dim)
    q, k, v = (torch.randn(size, dtype=dtype, device=DEVICE, requires_grad=backward) for _ in range(3))
    g = torch.randn_like(q)

    def call() -> None:
        with sdpa_kernel(PYTORCH[name]) if name in PYTORCH else nullcontext():
            out = op(q, k, v)
            if backward:
                q.grad = k.grad = v.grad = None
                out.backward(g)

    direction = "forward+backward" if backward else "forward"
    amount = (3.5 if backward else 1.0) * 2 * batch * heads * seq * seq * dim / 1e12
    case = f"causal attention {direction} {batch}×{heads}×{seq}×{dim} {short(dtype)}"
    rounds = None if ON_GPU else 11
    measure(
        call, case=case, implementation=name, rounds=rounds, warmup=rounds and 2, amount=amount, unit="TFLOP/s"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["eager", *KERNELS])
@pytest.mark.parametrize("batch", [1, 16])
def test_decode(measure: Any, batch: int, name: str) -> None:
    """One token against a cache, eight heads to a key."""
    heads, kv_heads, dim, tokens = (32, 4, 128, 32768) if ON_GPU else (16, 2, 128, 4096)
    q = torch.randn(batch, 1, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    k, v = (torch.randn(batch, tokens, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    if name == "eager":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        op = partial(F.scaled_dot_product_attention, enable_gqa=True)
    else:
        op = partial(flash_decode, backend=name)
    moved = 2 * k.numel() * k.element_size()
    case = f"decode {batch}×{heads}/{kv_heads}×{tokens}×{dim} bfloat16"
    with torch.no_grad():
        measure(lambda: op(q, k, v), case=case, implementation=name, bytes=moved)
