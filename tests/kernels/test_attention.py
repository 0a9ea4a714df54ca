from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import explain, flash_attention, flash_decode, native
from fastllm.kernels.attention import reference
from fastllm.kernels.attention.operators import in_rows
from tests.conftest import GPU
from tests.numerics import DTYPES, assert_accurate, with_gradients

KERNELS = ("cpu",) if GPU else ("cpu", "triton")  # the interpreter is off where there is a GPU


def qkv(seq_q, seq_k, heads=2, kv_heads=2, dim=16, dtype=torch.float32, batch=2, device="cpu") -> list[Tensor]:
    shapes = ((batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), (batch, seq_k, kv_heads, dim))
    return [torch.randn(s, device=device).to(dtype) for s in shapes]


def eager(q: Tensor, k: Tensor, v: Tensor, sinks=None, *, causal=True, window=None, softcap=0.0, scale=None) -> Tensor:
    """What one writes with PyTorch: its fused attention, or scores in the dtype where that can't express the call."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    if causal and sinks is None and seq_q > seq_k:  # the first queries see nothing
        out = eager(q[:, seq_q - seq_k :], k, v, causal=causal, window=window, softcap=softcap, scale=scale)
        return torch.cat([q[:, : seq_q - seq_k] * 0, out], 1)
    seen = reference._visible(seq_q, seq_k, causal, window, q.device)
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
    """Of the terms that out, lse, dq, dk, dv and dsinks are sums of, in float64.

    A score is itself a sum, whose error comes with it: d lse = Σ p ds, d out = Σ p (v - out) ds. lse is the highest
    score and the logarithm of a sum; ds = p (dp - dout · out + dlse) cancels. In the gradients p is e^(score - lse) of
    an lse rounded to float32, by which |lse| steps of p are lost.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = (t.detach() for t in _with_sinks(q, k, v, sinks, backend="torch", return_lse=True, causal=causal,
                                               window=window, softcap=softcap, scale=scale))  # fmt: skip
    groups = q.shape[2] // k.shape[2]
    kw, vw = (t.repeat_interleave(groups, 2) for t in (k, v))
    scores, slope = torch.einsum("bqhd,bkhd->bhqk", q, kw) * scale, 1.0
    if softcap:
        slope = 1 - torch.tanh(scores / softcap).square()
        scores = softcap * torch.tanh(scores / softcap)
    seen = reference._visible(q.shape[1], k.shape[1], causal, window, q.device)
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
    terms = magnitudes(*(t.double() for t in inputs), dout=dout, dlse=dlse, **options)
    assert_accurate(actual[0], plain[0], exact[0], "out", terms[0])
    assert bool((actual[1][~seen] == -torch.inf).all()) and bool(torch.isfinite(actual[1][seen]).all())
    assert_accurate(actual[1][seen], plain[1][seen], exact[1][seen], "lse", terms[1][seen])
    for name, *values in zip(("dq", "dk", "dv", "dsinks"), actual[2:], plain[2:], exact[2:], terms[2:], strict=False):
        got, own, right, magnitude = values
        assert_accurate(got, own, right, name, magnitude)


def _with_sinks(q, k, v, sinks=None, **options):
    return flash_attention(q, k, v, sinks=sinks, **options)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return request.param


LENGTHS = [(1, 1), (1, 300), (113, 203), (128, 217), (203, 113), (70, 70), (1023, 1024)]
DIMS = [1, 8, 40, 59, 64, 96, 111, 128, 192, 256]
HEADS = [(6, 6), (6, 2), (6, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy_on_cpus(lengths, dim, dtype):
    heads = HEADS[(LENGTHS.index(lengths) + DIMS.index(dim)) % 3]
    if max(lengths) > 1000:  # the float64 beside it takes seconds
        heads = (heads[0] // heads[1], 1)
    for causal in (True, False)[: 1 if max(lengths) > 1000 else 2]:
        check(qkv(*lengths, *heads, dim, dtype, batch=1), "cpu", causal=causal)


@pytest.mark.skipif(GPU, reason="the interpreter is off where there is a GPU; tests marked gpu run the kernel itself")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "dim", "heads"),
    [
        ((1, 1), 8, (1, 1)),
        ((1, 300), 59, (2, 1)),
        ((113, 203), 64, (2, 2)),
        ((128, 217), 16, (6, 2)),
        ((203, 113), 40, (2, 1)),
    ],
    ids=str,
)
def test_accuracy_in_triton(lengths, dim, heads, dtype):
    for causal in (True, False):
        check(qkv(*lengths, *heads, dim, dtype, batch=1), "triton", causal=causal)


OPTIONS = [
    {"window": 1}, {"window": 37}, {"softcap": 2.0}, {"causal": False, "softcap": 2.0}, {"scale": 0.3}, {"scale": -0.3},
    {"window": 100, "softcap": 5.0},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(kernel, options, dtype):
    lengths = [(113, 203), (203, 113)] if kernel == "cpu" else [(70, 150)]
    for size in lengths:
        check(qkv(*size, 4, 2, 24, dtype, batch=1), kernel, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 20, "softcap": 3.0}], ids=str)
def test_sinks(kernel, options, dtype):
    for size in ((40, 90), (90, 40)):
        check([*qkv(*size, 4, 2, 16, dtype, batch=2), torch.randn(4)], kernel, **options)


def test_the_sink_of_a_query_that_sees_nothing(kernel):
    q, k, v = qkv(5, 2, batch=1)
    sinks = torch.randn(2)
    out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, backend=kernel)
    assert torch.equal(out[:, :3], torch.zeros(1, 3, 2, 16))
    torch.testing.assert_close(lse[0, :, :3], sinks.unsqueeze(1).expand(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(dtype):
    """Every one that this processor runs."""
    cpu = native.KERNELS["cpu"]
    before = cpu.instruction_set()
    try:
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            check(qkv(113, 203, 4, 2, 40, dtype, batch=1), "cpu", window=80, softcap=4.0)
            q, k, v = qkv(3, 700, 4, 2, 40, dtype)
            check_decode(q, k, v, torch.tensor([700, 13]), "cpu")
    finally:
        cpu.use_instruction_set(before)


# The same cases every time: one in thousands is a little beyond the rule, where PyTorch's own error is small by chance.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 150), st.integers(0, 250), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70),
    st.booleans(), st.one_of(st.none(), st.integers(1, 200)), st.sampled_from([0.0, 3.0]), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(seq_q, seq_k, kv_heads, group, dim, causal, window, softcap, dtype):
    options = {"causal": causal or window is not None, "window": window, "softcap": softcap}
    if seq_q and seq_k:
        check(qkv(seq_q, seq_k, kv_heads * group, kv_heads, dim, dtype, batch=1), "cpu", **options)
    else:
        leaves = [t.requires_grad_() for t in qkv(seq_q, seq_k, kv_heads * group, kv_heads, dim, dtype)]
        out = flash_attention(*leaves, backend="cpu", **options)
        out.sum().backward()
        assert not out.any() and not any(t.grad.any() for t in leaves)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_nothing(kernel, shape):
    batch, seq_q, seq_k = shape
    leaves = [t.requires_grad_() for t in qkv(seq_q, seq_k, batch=batch)]
    out, lse = flash_attention(*leaves, return_lse=True, backend=kernel)
    assert out.shape == leaves[0].shape and not out.any()
    assert lse.shape == (batch, 2, seq_q) and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert not any(t.grad.any() for t in leaves)


# ---- packed sequences ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9, "softcap": 2.0}], ids=str)
def test_packed_equals_unpacked(kernel, options, dtype):
    lengths = [(1, 1), (70, 70), (0, 3), (5, 40), (33, 20), (4, 0), (100, 130)]
    if kernel == "triton":
        lengths = [(1, 1), (40, 40), (0, 3), (5, 20), (13, 8), (4, 0)]
    check_packed(kernel, lengths, options, dtype)


def check_packed(kernel, lengths, options, dtype, device="cpu") -> None:
    """Each sequence as if it were alone, bit for bit, gradients too."""
    sequences = [qkv(a, b, 4, 2, 24, dtype, batch=1, device=device) for a, b in lengths]
    packed = [torch.cat([s[i][0] for s in sequences]).requires_grad_() for i in range(3)]
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in zip(*lengths, strict=True))
    options = {"return_lse": True, "backend": kernel, **options}
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


def test_one_cu_seqlens_serves_both(kernel):
    q, k, v = (t[0] for t in qkv(50, 50, batch=1))
    cu = torch.tensor([0, 20, 50])
    both = flash_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=30, max_seqlen_k=30, backend=kernel)
    assert torch.equal(flash_attention(q, k, v, cu_seqlens_q=cu, backend=kernel), both)


@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
@pytest.mark.parametrize("cu", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 9], [0, -4, 5]], ids=str)
def test_cu_seqlens_that_are_wrong(backend, cu):
    q, k, v = (t[0] for t in qkv(5, 5, batch=1))
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to the 5 tokens"):
        flash_attention(q, k, v, cu_seqlens_q=torch.tensor(cu), backend=backend)


def test_wrong_cu_seqlens_without_queries(kernel):
    """Nothing runs forward; the backward pass must not read queries that are not there."""
    q, k, v = (t[0].requires_grad_() for t in qkv(0, 5, batch=1))
    cu = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to the 0 tokens"):
        flash_attention(q, k, v, cu_seqlens_q=cu, backend=kernel).sum().backward()


# ---- what a query must not see ----


def test_the_future_changes_nothing(kernel):
    seq = 150 if kernel == "cpu" else 80
    q, k, v = qkv(seq, seq, 2, 1, 16, batch=1)
    before = flash_attention(q, k, v, return_lse=True, backend=kernel)
    for at in (1, seq // 2, seq - 1):
        for spoil in (torch.randn_like, lambda t: torch.full_like(t, 1e30)):
            k2, v2 = k.clone(), v.clone()
            k2[:, at:], v2[:, at:] = spoil(k2[:, at:]), spoil(v2[:, at:])
            after = flash_attention(q, k2, v2, return_lse=True, backend=kernel)
            assert torch.equal(after[0][:, :at], before[0][:, :at])
            assert torch.equal(after[1][..., :at], before[1][..., :at])
            assert not torch.equal(after[0][:, at:], before[0][:, at:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_may_be_nan(kernel, bad, dtype):
    """In k everywhere; in v, whose products with a probability of 0 are NaN, on CPUs."""
    q, k, v = qkv(100, 100, 2, 1, 16, dtype, batch=1)
    hidden = [*range(60), *range(90, 100)]
    exact = reference.flash_attention(q.double(), k.double(), v.double(), window=30)[0]
    plain = eager(q, k, v, window=30)
    k[:, 60] = bad
    if kernel == "cpu":
        v[:, 60] = bad
    after = flash_attention(q, k, v, window=30, backend=kernel)
    assert_accurate(after[:, hidden], plain[:, hidden], exact[:, hidden])
    if bad != bad:
        assert bool(after[:, 60:90].isnan().all())


# ---- places in memory ----


def test_small_arguments_may_be_strided(kernel):
    """Sinks, cu_seqlens and lengths, each every second element of something."""

    def results(arrange):
        q, k, v = (t.requires_grad_() for t in qkv(9, 9, batch=1))
        packed = [t[0] for t in (q, k, v)]
        cu, lengths, sinks = (arrange(torch.tensor(n)) for n in ([0, 4, 9], [5], [0.5, -1.0]))
        out = flash_attention(*packed, sinks=sinks, cu_seqlens_q=cu, backend=kernel)
        grads = torch.autograd.grad(out.square().sum(), [q, k, v])
        with torch.no_grad():
            return [out, *grads, flash_decode(q[:, :1], k, v, lengths, sinks=sinks, backend=kernel)]

    torch.manual_seed(1)
    expected = results(lambda x: x)
    torch.manual_seed(1)
    for a, b in zip(results(lambda x: torch.stack([x, x + 1], -1).flatten()[::2]), expected, strict=True):
        assert torch.equal(a, b)


def test_strided_heads_are_read_in_place(kernel):
    """q, k and v cut out of one projection, and out of [batch, heads, seq, dim]."""
    fused = torch.randn(2, 45, 3 * 4 * 16)
    views = [t.unflatten(-1, (4, 16)) for t in fused.chunk(3, -1)]
    other = [torch.randn(2, 4, 45, 16).transpose(1, 2) for _ in range(3)]
    for tensors in (views, other):
        for t in tensors:
            assert in_rows(t) is t and not t.is_contiguous()
        grads = [torch.randn(2, 45, 4, 16).transpose(1, 2).contiguous().transpose(1, 2)]
        call = partial(flash_attention, backend=kernel)
        copies = with_gradients(call, [t.contiguous() for t in tensors], grads)
        leaf = [t.requires_grad_() for t in tensors]
        out = call(*leaf)
        assert torch.equal(out, copies[0])
        for a, b in zip(torch.autograd.grad(out, leaf, grads), copies[1:], strict=True):
            assert torch.equal(a, b)
    apart = torch.randn(2, 9, 4, 32)[..., ::2]  # the last dimension is strided: a copy
    assert torch.equal(call(apart, apart, apart), call(*(apart.contiguous(),) * 3))


def test_beyond_2_31_elements(kernel):
    """Tokens so far apart that 32 bits don't reach them; the memory between is never touched."""
    apart, tokens = 2**27 + 64, 40
    memory = torch.empty(apart * tokens, dtype=torch.float16)
    far = [memory[i * 16 :].as_strided((1, tokens, 1, 16), (0, apart, 16, 1)) for i in range(3)]
    near = qkv(tokens, tokens, 1, 1, 16, torch.float16, batch=1)
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    g = torch.randn_like(near[0])
    call = partial(flash_attention, backend=kernel)
    for a, b in zip(with_gradients(call, near, [g]), _gradients_in_place(call, far, g), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        far_out, near_out = (flash_decode(t[0][:, -1:], *t[1:], backend=kernel) for t in (far, near))
    assert torch.equal(far_out, near_out)


def _gradients_in_place(call, inputs, grad):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_32k_tokens():
    q, k, v = qkv(32768, 32768, 1, 1, 8, batch=1)
    out = flash_attention(q, k, v, backend="cpu")
    rows = torch.tensor([0, 1, 777, 16384, 32767])
    for row in rows.tolist():
        exact = reference.flash_attention(q[:, row : row + 1].double(), *(t[:, : row + 1].double() for t in (k, v)))[0]
        torch.testing.assert_close(out[:, row : row + 1].double(), exact, rtol=1e-5, atol=1e-5)


def test_threads_don_t_matter():
    """One key/value head is one unit for one thread and many for four: the same sums in the same order."""
    inputs, options = qkv(300, 500, 2, 1, 32, torch.bfloat16, batch=1), {"backend": "cpu", "return_lse": True}
    grads = [torch.randn_like(inputs[0]), torch.randn(1, 2, 300)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(with_gradients(partial(flash_attention, **options), inputs, grads))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- decoding ----


def check_decode(q, k, v, seqlens, backend, **options) -> None:
    call = partial(flash_decode, return_lse=True, **options)
    exact = call(*(t.double() for t in (q, k, v)), seqlens, backend="torch")
    wide = call(*(t.float() for t in (q, k, v)), seqlens, backend="torch")
    plain = call(q, k, v, seqlens, backend="torch")
    actual = call(q, k, v, seqlens, backend=backend)
    assert_accurate(actual[0], plain[0], exact[0], "out", exact[0].abs() + 1)
    seen = torch.isfinite(exact[1])
    assert torch.equal(torch.isfinite(actual[1]), seen)
    assert_accurate(actual[1][seen], wide[1][seen], exact[1][seen], "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seq_q", "heads", "dim"), [(1, (4, 4), 64), (1, (8, 2), 40), (3, (6, 1), 128), (5, (2, 2), 7)]
)
def test_decode(kernel, seq_q, heads, dim, dtype):
    capacity = 1500 if kernel == "cpu" else 300
    q, k, v = qkv(seq_q, capacity, *heads, dim, dtype, batch=4)
    seqlens = torch.tensor([capacity, 1, capacity // 2 + 1, 0])
    for options in ({}, {"window": 70}, {"softcap": 3.0, "scale": 0.2}, {"sinks": torch.randn(heads[0])}):
        check_decode(q, k, v, seqlens, kernel, **options)
    check_decode(q, k, v, None, kernel)


def test_decode_does_not_look_beyond_what_the_cache_holds(kernel):
    q, k, v = qkv(2, 200, 4, 2, 16, batch=2)
    seqlens = torch.tensor([130, 7], dtype=torch.int32)
    before = flash_decode(q, k, v, seqlens, backend=kernel)
    for i, n in enumerate(seqlens.tolist()):
        k[i, n:], v[i, n:] = float("nan"), float("inf")
    assert torch.equal(flash_decode(q, k, v, seqlens, backend=kernel), before)
    outside = torch.tensor([10**6, -5], dtype=torch.int64)  # nothing is read there
    assert flash_decode(q, k, v, outside, backend=kernel).shape == q.shape


def test_attention_of_a_few_queries_is_decoding(kernel, monkeypatch):
    q, k, v = qkv(1, 90, 8, 2, 16, torch.bfloat16)
    expected = flash_decode(q, k, v, backend=kernel)
    assert torch.equal(flash_attention(q, k, v, backend=kernel), expected)
    assert torch.equal(flash_attention(q, k, v, causal=False, backend=kernel), expected)
    with_graph = flash_attention(q.requires_grad_(), k, v, backend=kernel)
    torch.testing.assert_close(with_graph, expected, rtol=1e-2, atol=1e-2)


def test_decode_refuses():
    q, k, v = qkv(1, 9, 4, 2)
    with pytest.raises(ValueError, match="it has no gradient, and an argument requires one"):
        flash_decode(q.requires_grad_(), k, v)
    q = q.detach()
    with pytest.raises(ValueError, match=r"cache_seqlens must have shape \[2\]"):
        flash_decode(q, k, v, torch.tensor([3]))
    with pytest.raises(TypeError, match="cache_seqlens must be int64 or int32"):
        flash_decode(q, k, v, torch.tensor([3.0, 3.0]))
    with pytest.raises(ValueError, match="v_cache must have shape"):
        flash_decode(q, k, v[:, 1:])


# ---- as an operator ----


def test_compiles_as_one_graph(kernel):
    inputs = [t.requires_grad_() for t in qkv(33, 33, 4, 2, 16, batch=1)]
    sinks = torch.randn(4, requires_grad=True)

    def call(q, k, v, sinks):
        out, lse = flash_attention(q, k, v, sinks=sinks, window=20, return_lse=True, backend=kernel)
        return out.sum() + lse.sum()

    expected = torch.autograd.grad(call(*inputs, sinks), [*inputs, sinks])
    got = torch.autograd.grad(
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs, sinks), [*inputs, sinks]
    )
    torch.testing.assert_close(got, expected)
    cu = torch.tensor([0, 10, 33])
    packed = [t[0].detach().requires_grad_() for t in inputs]
    call = partial(flash_attention, cu_seqlens_q=cu, backend=kernel)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*packed).sum(), packed)
    torch.testing.assert_close(torch.autograd.grad(compiled(*packed).sum(), packed), expected)
    with torch.no_grad():
        decode = torch.compile(partial(flash_decode, backend=kernel), fullgraph=True, backend="aot_eager")
        one = [t.detach() for t in inputs]
        assert torch.equal(decode(one[0][:, -2:], *one[1:]), flash_decode(one[0][:, -2:], *one[1:], backend=kernel))


def test_operators(kernel):
    q, k, v = qkv(9, 12, 4, 2, 16)
    ops, options = torch.ops.fastllm, (0.25, True, 5, 0.0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attention_forward, (q, k, v, None, None, None, 0, 0, *options, kernel), test_utils=tests)
    out, lse = ops.attention_forward(q, k, v, None, None, None, 0, 0, *options, kernel)
    rest = (q, k, v, out, lse, None, None, 0, 0, *options, False, kernel)
    torch.library.opcheck(ops.attention_backward, (out, lse, *rest), test_utils=tests)
    torch.library.opcheck(ops.attention_decode, (q, k, v, None, None, *options, kernel), test_utils=tests)


def test_only_what_is_wanted(kernel):
    """Gradients of k alone; through lse alone; of nothing."""
    q, k, v = qkv(20, 20, batch=1)
    k.requires_grad_()
    out, lse = flash_attention(q, k, v, return_lse=True, backend=kernel)
    (through_lse,) = torch.autograd.grad(lse.sum(), k)
    exact = reference.flash_attention(q, k, v)[1]
    torch.testing.assert_close(through_lse, torch.autograd.grad(exact.sum(), k)[0])
    assert flash_attention(q, k.detach(), v, backend=kernel).grad_fn is None


def test_second_derivative_says_what_to_do(kernel):
    q, k, v = (t.requires_grad_() for t in qkv(5, 5, batch=1))
    (dq,) = torch.autograd.grad(flash_attention(q, k, v, backend=kernel).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="flash_attention: its kernels have no second derivative"):
        dq.sum().backward()


def test_the_same_bits_at_every_call(kernel):
    inputs = qkv(90, 90, 4, 1, 16, torch.bfloat16, batch=1)
    call = partial(flash_attention, deterministic=True, backend=kernel)
    g = torch.randn_like(inputs[0])
    for a, b in itertools.pairwise([with_gradients(call, inputs, [g]) for _ in range(3)]):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_wide_heads_go_to_pytorch():
    q, k, v = qkv(5, 5, dim=257)
    assert explain(flash_attention, q, k, v).chosen == "torch"
    with pytest.raises(ValueError, match="its kernels take a head_dim up to 256"):
        flash_attention(q, k, v, backend="cpu")
    torch.testing.assert_close(flash_attention(q, k, v), eager(q, k, v))


# ---- on a GPU ----


# Each head dimension, dtype and set of options is compiled anew, which takes seconds; lengths and heads are not.
GPU_CASES = [
    *((dim, torch.bfloat16, {}) for dim in DIMS),
    *((64, torch.bfloat16, options) for options in OPTIONS),
    *((dim, torch.bfloat16, {"causal": False}) for dim in (128, 256)),
    (128, torch.bfloat16, {"window": 100, "softcap": 5.0}),
    *((dim, dtype, {}) for dim in (59, 64, 128) for dtype in (torch.float16, torch.float32)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "dtype", "options"), GPU_CASES, ids=str)
def test_accuracy_on_gpus(dim, dtype, options):
    for i, lengths in enumerate(LENGTHS):
        check(qkv(*lengths, *HEADS[i % 3], dim, dtype, batch=1, device="cuda"), "triton", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 150, "softcap": 2.0}], ids=str)
def test_packed_and_sinks_on_gpus(options):
    check_packed("triton", [(1, 1), (300, 300), (0, 3), (5, 400), (133, 70), (4, 0)], options, torch.bfloat16, "cuda")
    inputs = [*qkv(200, 300, 4, 2, 64, torch.bfloat16, device="cuda"), torch.randn(4, device="cuda")]
    check(inputs, "triton", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_on_gpus(dtype):
    for seq_q, heads, dim in ((1, (32, 8), 128), (4, (6, 1), 40), (16, (4, 4), 64)):
        q, k, v = qkv(seq_q, 5000, *heads, dim, dtype, batch=3, device="cuda")
        check_decode(q, k, v, torch.tensor([5000, 1, 1234], device="cuda"), "triton")
        check_decode(q, k, v, None, "triton", window=100, softcap=3.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sequences_on_gpus(dtype):
    """Against PyTorch's own kernels, by float64 for the last queries."""
    q, k, v = qkv(32768, 32768, 2, 1, 128, dtype, batch=1, device="cuda")
    out = flash_attention(q, k, v, backend="triton")
    exact = reference.flash_attention(q[:, -64:].double(), k.double(), v.double())[0]
    plain = eager(q[:, -64:], k, v)
    assert_accurate(out[:, -64:], plain, exact)
