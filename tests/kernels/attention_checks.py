"""Checks of attention against float64 that several files of tests share."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import flash_attention, flash_decode
from fastllm.kernels.attention import reference
from fastllm.kernels.attention.options import bounds
from tests.numerics import assert_accurate, with_gradients

OPTIONS = [
    {"window": 1}, {"window": 37}, {"softcap": 2.0}, {"causal": False, "softcap": 2.0}, {"scale": 0.3}, {"scale": -0.3},
    {"window": 100, "softcap": 5.0},
]  # fmt: skip
NARROW = (torch.float16, torch.bfloat16)  # what the CUDA C++ kernels of attention take


def plain_dtype(backend: str) -> torch.dtype:
    """float32, or what is nearest to it among the backend's dtypes."""
    return torch.float16 if backend == "cuda" else torch.float32


def each_backend(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Runs a test with each (backend, dtype); of ``cuda`` with all of its dtypes."""
    pairs = [(b, d) for b in ("cpu", "triton", "cuda") for d in (NARROW if b == "cuda" else dtypes)]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, indirect=["backend"], ids=str)


def qkv(seq_q, seq_k, heads=2, kv_heads=2, dim=16, dtype=torch.float32, batch=2, device="cpu") -> list[Tensor]:
    shapes = ((batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), (batch, seq_k, kv_heads, dim))
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def eager(q: Tensor, k: Tensor, v: Tensor, sinks=None, *, causal=True, window=None, softcap=0.0, scale=None) -> Tensor:
    """What one writes with PyTorch: its fused attention, or scores in the dtype where that can't express the call."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    if causal and sinks is None and seq_q > seq_k:  # the first queries see nothing
        out = eager(q[:, seq_q - seq_k :], k, v, causal=causal, window=window, softcap=softcap, scale=scale)
        return torch.cat([q[:, : seq_q - seq_k] * 0, out], 1)
    seen = reference._visible(seq_q, seq_k, *bounds("eager", causal, window), q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if sinks is None and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :seq_k] @ v).transpose(1, 2)


def magnitudes(q, k, v, sinks=None, *, dout, dlse, causal=True, window=None, softcap=0.0, scale=None) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = (t.detach() for t in _with_sinks(q, k, v, sinks, backend="torch", return_lse=True, causal=causal,
                                               window=window, softcap=softcap, scale=scale))  # fmt: skip
    seen = reference._visible(q.shape[1], k.shape[1], *bounds("magnitudes", causal, window), q.device)
    return terms(q, k, v, sinks, out, lse, seen, dout, dlse, scale, softcap)


def terms(q, k, v, sinks, out, lse, seen, dout, dlse, scale, softcap=0.0) -> list[Tensor]:
    """The magnitudes of the terms that out, lse, dq, dk, dv and dsinks are sums of, in float64.

    A score is itself a sum, whose error comes with it: d lse = Σ p ds, d out = Σ p (v - out) ds. lse is the highest
    score and the logarithm of a sum; ds = p (dp - dout · out + dlse) cancels. In the gradients p is e^(score - lse) of
    an lse rounded to float32, by which |lse| steps of p are lost.
    """
    groups = q.shape[2] // k.shape[2]
    kw, vw = (t.repeat_interleave(groups, 2) for t in (k, v))
    scores, slope = torch.einsum("bqhd,bkhd->bhqk", q, kw) * scale, 1.0
    if softcap:
        slope = 1 - torch.tanh(scores / softcap).square()
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~seen, 0.0)
    of_scores = torch.einsum("bqhd,bkhd->bhqk", q.abs(), kw.abs()) * abs(scale) * slope
    of_out = torch.einsum("bhqk,bkhd->bqhd", p * (1 + of_scores), vw.abs())
    of_out = of_out + (p * of_scores).sum(-1).transpose(1, 2).unsqueeze(-1) * out.abs()
    highest = scores.masked_fill(~seen, float("-inf")).amax(-1)
    if sinks is not None:
        highest = torch.maximum(highest, sinks.view(-1, 1))
    of_lse = (p * of_scores).sum(-1) + highest.abs() + (lse - highest).abs()
    p = p * (1 + lse.abs().unsqueeze(-1)).masked_fill(~seen, 0.0)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout.abs(), vw.abs())
    delta = (dout * out).abs().sum(-1).transpose(1, 2) + dlse.abs()
    ds = p * (dp + delta.unsqueeze(-1)) * slope * abs(scale)
    of_keys = [torch.einsum("bhqk,bqhd->bkhd", a, b.abs()) for a, b in ((ds, q), (p, dout))]
    of_keys = [t.unflatten(2, (-1, groups)).sum(3) for t in of_keys]
    of_sinks = [] if sinks is None else [(torch.exp(sinks.view(-1, 1) - lse) * (1 + lse.abs()) * delta).sum((0, 2))]
    return [of_out, of_lse, torch.einsum("bhqk,bkhd->bqhd", ds, kw.abs()), *of_keys, *of_sinks]


def check(inputs, backend, **options) -> None:
    """By the rule for numerics, forward, lse and each gradient; lse is float32, as PyTorch's is of wide inputs."""
    q = inputs[0]
    call, spec = (partial(_with_sinks, backend=b, return_lse=True, **options) for b in (backend, "torch"))
    seen = torch.isfinite(spec(*(t.double() for t in inputs))[1])
    grads = [torch.randn_like(q), torch.randn(seen.shape, device=q.device) * seen]

    def plain_call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return eager(*leaves, **options), spec(*(t.float() for t in leaves))[1]

    actual, plain = with_gradients(call, inputs, grads), with_gradients(plain_call, inputs, grads)
    exact = with_gradients(spec, inputs, grads, Tensor.double)
    dout, dlse = (g.double() for g in grads)
    sums = magnitudes(*(t.double() for t in inputs), dout=dout, dlse=dlse, **options)
    assert_accurate(actual[0], plain[0], exact[0], "out", sums[0])
    assert bool((actual[1][~seen] == -torch.inf).all()) and bool(torch.isfinite(actual[1][seen]).all())
    assert_accurate(actual[1][seen], plain[1][seen], exact[1][seen], "lse", sums[1][seen])
    for name, *values in zip(("dq", "dk", "dv", "dsinks"), actual[2:], plain[2:], exact[2:], sums[2:], strict=False):
        got, own, right, magnitude = values
        assert_accurate(got, own, right, name, magnitude)


def check_same(call, other, *tensors: Tensor, gradients: bool = True) -> None:
    """``call`` computes what ``other``, of PyTorch, does: by the rule, forward and each gradient."""
    if gradients:
        run, grads = with_gradients, [torch.randn_like(call(*tensors))]
    else:
        run, grads = (lambda f, tensors, _, cast=lambda t: t: [f(*map(cast, tensors))]), []
    actual, eager, exact = (
        run(call, tensors, grads),
        run(other, tensors, grads),
        run(other, tensors, grads, Tensor.double),
    )
    for name, *values in zip(("out", "dq", "dk", "dv"), actual, eager, exact, strict=False):
        got, own, right = values
        assert_accurate(got, own, right, name, right.abs() + tensors[1].shape[1])  # as many terms may cancel


def _with_sinks(q, k, v, sinks=None, **options):
    return flash_attention(q, k, v, sinks=sinks, **options)


def check_packed(backend, lengths, options, dtype, device="cpu") -> None:
    """Each sequence as if it were alone, bit for bit, gradients too."""
    sequences = [qkv(a, b, 4, 2, 24, dtype, batch=1, device=device) for a, b in lengths]
    packed = [torch.cat([s[i][0] for s in sequences]).requires_grad_() for i in range(3)]
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in zip(*lengths, strict=True))
    options = {"return_lse": True, "backend": backend, **options}
    out, lse = flash_attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k.long(), **options)
    grad, dlse = torch.randn_like(out), torch.randn_like(lse) * torch.isfinite(lse)
    got = torch.autograd.grad([out, lse], packed, [grad, dlse])
    for i, sequence in enumerate(sequences):
        leaves = [t.requires_grad_() for t in sequence]
        one, one_lse = flash_attention(*leaves, **options)
        at_q, at_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        assert torch.equal(out[at_q], one[0]) and torch.equal(lse[:, at_q], one_lse[0])
        if one.numel() == 0:
            continue
        expected = torch.autograd.grad([one, one_lse], leaves, [grad[None, at_q], dlse[None, :, at_q]])
        for a, b, at in zip(got, expected, (at_q, at_k, at_k), strict=True):
            assert torch.equal(a[at], b[0])


def gradients_in_place(call, inputs, grad):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_decode(q, k, v, seqlens, backend, **options) -> None:
    call = partial(flash_decode, return_lse=True, **options)
    exact = call(*(t.double() for t in (q, k, v)), seqlens, backend="torch")
    wide = call(*(t.float() for t in (q, k, v)), seqlens, backend="torch")
    plain = call(q, k, v, seqlens, backend="torch")
    actual = call(q, k, v, seqlens, backend=backend)
    assert_accurate(actual[0], plain[0], exact[0], "out", exact[0].abs() + 1)
    seen = torch.isfinite(exact[1])
    assert torch.equal(torch.isfinite(actual[1]), seen)
    sums = torch.zeros_like(exact[1])
    held = [k.shape[1]] * len(q) if seqlens is None else seqlens.clamp(0, k.shape[1]).tolist()
    options = {name: x.double() if name == "sinks" and x is not None else x for name, x in options.items()}
    for i, n in enumerate(held):
        if n:
            one = [q[i : i + 1].double(), *(t[i : i + 1, :n].double() for t in (k, v))]
            none = {"dout": torch.zeros_like(exact[0][i : i + 1]), "dlse": torch.zeros_like(exact[1][i : i + 1])}
            sums[i] = magnitudes(*one, **none, **options)[1][0]
    assert_accurate(actual[1][seen], wide[1][seen], exact[1][seen], "lse", sums[seen])
