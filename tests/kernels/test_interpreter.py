"""The mended interpreter is right where Triton's is not (tests/interpreter.py)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import GPU
from tests.interpreter import to_bfloat16

pytestmark = pytest.mark.skipif(GPU, reason="the interpreter is off where there is a GPU")


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def round_kernel(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype):
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-4)


def test_rounding():
    x = torch.cat([torch.randn(250), torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8])])
    y = torch.empty(256, dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, N=256)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


def test_rounding_of_every_bfloat16_boundary():
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | low).view(torch.float32)
        x = x[~x.isnan()]
        assert torch.equal(torch.from_numpy(to_bfloat16(x.numpy()).view("int16")), x.bfloat16().view(torch.int16))
