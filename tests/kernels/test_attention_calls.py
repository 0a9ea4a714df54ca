"""What attention reads, refuses and compiles to; decoding."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from fastllm.kernels import explain, flash_attention, flash_decode
from fastllm.kernels.attention import reference
from fastllm.kernels.attention.operators import in_rows
from tests.kernels.attention_checks import (
    check_decode,
    each_backend,
    eager,
    gradients_in_place,
    plain_dtype,
    qkv,
)
from tests.numerics import DTYPES, assert_accurate, on_gpus, with_gradients


def test_the_future_changes_nothing(backend):
    seq = 80 if backend == "triton" else 150
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32  # float16 has no 1e30
    q, k, v = qkv(seq, seq, 2, 1, 16, dtype, batch=1)
    before = flash_attention(q, k, v, return_lse=True, backend=backend)
    for at in (1, seq // 2, seq - 1):
        for spoil in (torch.randn_like, lambda t: torch.full_like(t, 1e30)):
            k2, v2 = k.clone(), v.clone()
            k2[:, at:], v2[:, at:] = spoil(k2[:, at:]), spoil(v2[:, at:])
            after = flash_attention(q, k2, v2, return_lse=True, backend=backend)
            assert torch.equal(after[0][:, :at], before[0][:, :at])
            assert torch.equal(after[1][..., :at], before[1][..., :at])
            assert not torch.equal(after[0][:, at:], before[0][:, at:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_backend(torch.float32, torch.bfloat16)
def test_what_is_hidden_may_be_nan(backend, bad, dtype):
    """In k everywhere; in v, whose products with a probability of 0 are NaN, on CPUs."""
    q, k, v = qkv(100, 100, 2, 1, 16, dtype, batch=1)
    hidden = [*range(60), *range(90, 100)]
    exact = reference.flash_attention(q.double(), k.double(), v.double(), window=30)[0]
    plain = eager(q, k, v, window=30)
    k[:, 60] = bad
    if backend == "cpu":
        v[:, 60] = bad
    after = flash_attention(q, k, v, window=30, backend=backend)
    assert_accurate(after[:, hidden], plain[:, hidden], exact[:, hidden])
    if bad != bad:
        assert bool(after[:, 60:90].isnan().all())


def test_small_arguments_may_be_strided(backend):
    """Sinks, cu_seqlens and lengths, each every second element of something."""

    def results(arrange):
        q, k, v = (t.requires_grad_() for t in qkv(9, 9, dtype=plain_dtype(backend), batch=1))
        packed = [t[0] for t in (q, k, v)]
        cu, lengths, sinks = (arrange(torch.tensor(n)) for n in ([0, 4, 9], [5], [0.5, -1.0]))
        out = flash_attention(*packed, sinks=sinks, cu_seqlens_q=cu, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), [q, k, v])
        with torch.no_grad():
            return [out, *grads, flash_decode(q[:, :1], k, v, lengths, sinks=sinks, backend=backend)]

    torch.manual_seed(1)
    expected = results(lambda x: x)
    torch.manual_seed(1)
    for a, b in zip(results(lambda x: torch.stack([x, x + 1], -1).flatten()[::2]), expected, strict=True):
        assert torch.equal(a, b)


def test_strided_heads_are_read_in_place(backend):
    """q, k and v cut out of one projection, and out of [batch, heads, seq, dim]."""
    randn = partial(torch.randn, dtype=plain_dtype(backend))
    views = [t.unflatten(-1, (4, 16)) for t in randn(2, 45, 3 * 4 * 16).chunk(3, -1)]
    other = [randn(2, 4, 45, 16).transpose(1, 2) for _ in range(3)]
    for tensors in (views, other):
        for t in tensors:
            assert in_rows(t)[0] is t and not t.is_contiguous()
        grads = [randn(2, 45, 4, 16).transpose(1, 2).contiguous().transpose(1, 2)]
        call = partial(flash_attention, backend=backend)
        copies = with_gradients(call, [t.contiguous() for t in tensors], grads)
        leaf = [t.requires_grad_() for t in tensors]
        out = call(*leaf)
        assert torch.equal(out, copies[0])
        for a, b in zip(torch.autograd.grad(out, leaf, grads), copies[1:], strict=True):
            assert torch.equal(a, b)
    apart = randn(2, 9, 4, 32)[..., ::2]  # the last dimension is strided: a copy
    assert torch.equal(call(apart, apart, apart), call(*(apart.contiguous(),) * 3))


def test_beyond_2_31_elements(backend):
    """Tokens so far apart that 32 bits don't reach them; the memory between is never touched."""
    apart, tokens = 2**27 + 64, 40
    memory = torch.empty(apart * tokens, dtype=torch.float16)
    far = [memory[i * 16 :].as_strided((1, tokens, 1, 16), (0, apart, 16, 1)) for i in range(3)]
    near = qkv(tokens, tokens, 1, 1, 16, torch.float16, batch=1)
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    g = torch.randn_like(near[0])
    call = partial(flash_attention, backend=backend)
    for a, b in zip(with_gradients(call, near, [g]), gradients_in_place(call, far, g), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        far_out, near_out = (flash_decode(t[0][:, -1:], *t[1:], backend=backend) for t in (far, near))
    assert torch.equal(far_out, near_out)


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


@each_backend(*DTYPES)
@pytest.mark.parametrize(
    ("seq_q", "heads", "dim"), [(1, (4, 4), 64), (1, (8, 2), 40), (3, (6, 1), 128), (5, (2, 2), 7)]
)
def test_decode(backend, seq_q, heads, dim, dtype):
    capacity = 300 if backend == "triton" else 1500
    q, k, v = qkv(seq_q, capacity, *heads, dim, dtype, batch=4)
    seqlens = torch.tensor([capacity, 1, capacity // 2 + 1, 0])
    for options in ({}, {"window": 70}, {"softcap": 3.0, "scale": 0.2}, {"sinks": torch.randn(heads[0])}):
        check_decode(q, k, v, seqlens, backend, **options)
    check_decode(q, k, v, None, backend)


def test_decode_does_not_look_beyond_what_the_cache_holds(backend):
    q, k, v = qkv(2, 200, 4, 2, 16, plain_dtype(backend), batch=2)
    seqlens = torch.tensor([130, 7], dtype=torch.int32)
    before = flash_decode(q, k, v, seqlens, backend=backend)
    for i, n in enumerate(seqlens.tolist()):
        k[i, n:], v[i, n:] = float("nan"), float("inf")
    assert torch.equal(flash_decode(q, k, v, seqlens, backend=backend), before)
    outside = torch.tensor([10**6, -5], dtype=torch.int64)  # nothing is read there
    assert flash_decode(q, k, v, outside, backend=backend).shape == q.shape


def test_attention_of_a_few_queries_is_decoding(backend, monkeypatch):
    q, k, v = qkv(1, 90, 8, 2, 16, torch.bfloat16)
    expected = flash_decode(q, k, v, backend=backend)
    assert torch.equal(flash_attention(q, k, v, backend=backend), expected)
    assert torch.equal(flash_attention(q, k, v, causal=False, backend=backend), expected)
    with_graph = flash_attention(q.requires_grad_(), k, v, backend=backend)
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


def test_compiles_as_one_graph(backend):
    inputs = [t.requires_grad_() for t in qkv(33, 33, 4, 2, 16, plain_dtype(backend), batch=1)]
    sinks = torch.randn(4, requires_grad=True)

    def call(q, k, v, sinks):
        out, lse = flash_attention(q, k, v, sinks=sinks, window=20, return_lse=True, backend=backend)
        return out.sum() + lse.sum()

    expected = torch.autograd.grad(call(*inputs, sinks), [*inputs, sinks])
    got = torch.autograd.grad(
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs, sinks), [*inputs, sinks]
    )
    torch.testing.assert_close(got, expected)
    cu = torch.tensor([0, 10, 33])
    packed = [t[0].detach().requires_grad_() for t in inputs]
    call = partial(flash_attention, cu_seqlens_q=cu, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*packed).sum(), packed)
    torch.testing.assert_close(torch.autograd.grad(compiled(*packed).sum(), packed), expected)
    with torch.no_grad():
        decode = torch.compile(partial(flash_decode, backend=backend), fullgraph=True, backend="aot_eager")
        one = [t.detach() for t in inputs]
        assert torch.equal(decode(one[0][:, -2:], *one[1:]), flash_decode(one[0][:, -2:], *one[1:], backend=backend))


def test_operators(backend):
    q, k, v = qkv(9, 12, 4, 2, 16, plain_dtype(backend))
    ops, options = torch.ops.fastllm, (0.25, 4, 0, 0.0)
    tests = ("test_schema", "test_faketensor")
    for wants_lse in (False, True):
        given = (q, k, v, None, *(None, None, 0, 0), *options, wants_lse, wants_lse, backend)
        torch.library.opcheck(ops.attention_forward, given, test_utils=tests)
        torch.library.opcheck(
            ops.attention_decode, (q, k, v, None, None, None, *options, wants_lse, backend), test_utils=tests
        )
    out, lse = ops.attention_forward(q, k, v, None, None, None, 0, 0, *options, True, True, backend)
    rest = (q, k, v, out, lse, None, None, 0, 0, *options, False, backend)
    torch.library.opcheck(ops.attention_backward, (out, lse, *rest), test_utils=tests)


def test_only_what_is_wanted(backend):
    """Gradients of k alone; through lse alone; of nothing."""
    q, k, v = qkv(20, 20, dtype=plain_dtype(backend), batch=1)

    def through_lse(chosen: str, cast=lambda t: t) -> Tensor:
        leaf = cast(k).requires_grad_()
        lse = flash_attention(cast(q), leaf, cast(v), return_lse=True, backend=chosen)[1]
        return torch.autograd.grad(lse.sum(), leaf)[0]

    exact = through_lse("torch", Tensor.double)
    assert_accurate(through_lse(backend), through_lse("torch"), exact, "dk", exact.abs() + 1)
    assert flash_attention(q, k.detach(), v, backend=backend).grad_fn is None


def test_second_derivative_says_what_to_do(backend):
    q, k, v = (t.requires_grad_() for t in qkv(5, 5, dtype=plain_dtype(backend), batch=1))
    (dq,) = torch.autograd.grad(flash_attention(q, k, v, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="flash_attention: its kernels have no second derivative"):
        dq.sum().backward()


def test_the_same_bits_at_every_call(backend):
    inputs = qkv(90, 90, 4, 1, 16, torch.bfloat16, batch=1)
    call = partial(flash_attention, deterministic=True, backend=backend)
    g = torch.randn_like(inputs[0])
    for a, b in itertools.pairwise([with_gradients(call, inputs, [g]) for _ in range(3)]):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_wide_heads_go_to_pytorch():
    q, k, v = qkv(5, 5, dim=257)
    assert explain(flash_attention, q, k, v).chosen == "torch"
    with pytest.raises(ValueError, match="its kernels take a head_dim up to 256"):
        flash_attention(q, k, v, backend="cpu")
    torch.testing.assert_close(flash_attention(q, k, v), eager(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("gpu_backend", "dtype", "shape"),
    on_gpus([(1, (32, 8), 128), (4, (6, 1), 40), (16, (4, 4), 64)], DTYPES[1:]),
    ids=str,
)
def test_decode_on_gpus(gpu_backend, dtype, shape):
    seq_q, heads, dim = shape
    q, k, v = qkv(seq_q, 5000, *heads, dim, dtype, batch=3, device="cuda")
    check_decode(q, k, v, torch.tensor([5000, 1, 1234], device="cuda"), gpu_backend)
    check_decode(q, k, v, None, gpu_backend, window=100, softcap=3.0)
