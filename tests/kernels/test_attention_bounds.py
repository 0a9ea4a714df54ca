"""Attention's operators with values of another width than keys, and with windows to both sides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels.attention import operators
from fastllm.kernels.attention.options import UNBOUNDED, Options
from fastllm.kernels.attention.packing import Packing
from tests.kernels.attention_checks import NARROW, plain_dtype, qkv, terms
from tests.numerics import DTYPES, assert_accurate, with_gradients

WINDOWS = [(UNBOUNDED, 0), (UNBOUNDED, UNBOUNDED), (20, 0), (20, 9), (0, 33), (5, UNBOUNDED), (0, 0), (150, 70)]
WIDTHS = [(192, 128), (40, 40), (16, 56), (7, 1)]
# Of CUDA C++, which the emulator takes seconds for, each window in one dtype.
CASES = [(window, "cpu", dtype) for window in WINDOWS for dtype in DTYPES]
CASES += [(window, "cuda", NARROW[i % 2]) for i, window in enumerate(WINDOWS)]
UNPACKED = Packing(None, None, 0, 0)


def seen(seq_q: int, seq_k: int, left: int, right: int) -> Tensor:
    ahead = torch.arange(seq_k) - torch.arange(seq_k - seq_q, seq_k).unsqueeze(1)
    return (ahead >= -left) & (ahead <= right)


def eager(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    mask = seen(q.shape[2], k.shape[2], left, right)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.masked_fill(~mask.any(1, keepdim=True), 0.0).transpose(1, 2)


def inputs(seq_q: int, seq_k: int, dim: int, dim_v: int, dtype: torch.dtype) -> list[Tensor]:
    q, k, _ = qkv(seq_q, seq_k, 4, 2, dim, dtype)
    return [q, k, torch.randn(2, seq_k, 2, dim_v).to(dtype)]


@pytest.mark.parametrize(("window", "backend", "dtype"), CASES, indirect=["backend"], ids=str)
def test_forward_and_backward(window, backend, dtype):
    # Far wider values make a score's gradient a sum of which rounding out to 16 bits, as delta does, takes much away;
    # PyTorch keeps the probabilities instead where the widths differ.
    extreme = [(1, 256)] if dtype == torch.float32 else [(64, 256)]
    for i, (dim, dim_v) in enumerate(WIDTHS + extreme):
        seq_q, seq_k = ((130, 130), (70, 203), (1, 300), (203, 70), (33, 210))[i]
        given = inputs(seq_q, seq_k, dim, dim_v, dtype)
        options = Options(dim**-0.5, *window, 0.0)
        dout = torch.randn(2, seq_q, 4, dim_v).to(dtype)
        out, lse = operators.attention_forward(*given, None, UNPACKED, options, True, True, backend)
        got = operators.attention_backward(dout, None, *given, out, lse, UNPACKED, options, False, backend)[:3]
        plain = with_gradients(lambda *leaves: eager(*leaves, *window), given, [dout])
        exact = with_gradients(lambda *leaves: eager(*leaves, *window), given, [dout], Tensor.double)
        q, k, v = (t.double() for t in given)
        mask = seen(seq_q, seq_k, *window)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * options.scale
        right = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        sums = terms(q, k, v, None, exact[0], right, mask, dout.double(), torch.zeros_like(right), options.scale)
        torch.testing.assert_close(lse.double(), right, rtol=1e-5, atol=1e-5)
        sums.pop(1)
        for name, *values in zip(("out", "dq", "dk", "dv"), (out, *got), plain, exact, sums, strict=True):
            a, b, c, magnitude = values
            assert_accurate(a, b, c, f"{name} {dim} {dim_v}", magnitude)


@pytest.mark.parametrize(("window", "backend", "dtype"), CASES, indirect=["backend"], ids=str)
def test_decode(window, backend, dtype):
    """Several queries, of sequences that fill their cache differently."""
    for (dim, dim_v), seq_q in zip([*WIDTHS, (1, 256)], (1, 3, 17, 2, 5), strict=True):
        q, k, v = inputs(seq_q, 700, dim, dim_v, dtype)
        options, lengths = Options(dim**-0.5, *window, 0.0), torch.tensor([700, 333])
        out, lse = operators.attention_decode(q, k, v, lengths, None, None, options, True, backend)
        assert lse.shape == (2, 4, seq_q)
        for i, n in enumerate(lengths.tolist()):
            one = [q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]]
            exact = eager(*(t.double() for t in one), *window)
            assert_accurate(out[i : i + 1], eager(*one, *window), exact, f"{dim} {dim_v}", exact.abs() + 1)


@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
def test_packed_sequences_see_themselves_alone(backend):
    lengths, options = [(40, 40), (0, 3), (5, 70), (30, 11)], Options(0.2, 9, 4, 3.0)
    sequences = [inputs(a, b, 24, 40, plain_dtype(backend)) for a, b in lengths]
    q, k, v = (torch.cat([s[i][0] for s in sequences]) for i in range(3))
    cu = [torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True)]
    packing = Packing(*cu, 0, 0)
    out, lse = operators.attention_forward(q, k, v, None, packing, options, True, True, backend)
    dout = torch.randn_like(out)
    grads = operators.attention_backward(dout, None, q, k, v, out, lse, packing, options, False, backend)[:3]
    for i, sequence in enumerate(sequences):
        one = [t[:1] for t in sequence]
        queries, keys = (slice(c[i], c[i + 1]) for c in cu)
        alone = operators.attention_forward(*one, None, UNPACKED, options, True, True, backend)
        assert torch.equal(out[queries], alone[0][0]) and torch.equal(lse[:, queries], alone[1][0])
        back = operators.attention_backward(dout[None, queries], None, *one, *alone, UNPACKED, options, False, backend)
        for a, b, at in zip(grads, back, (queries, keys, keys), strict=False):
            assert torch.equal(a[at], b[0])
