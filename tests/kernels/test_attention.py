from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.kernels import flash_attention, native
from fastllm.kernels.attention import reference
from fastllm.kernels.attention.options import UNBOUNDED, Options
from fastllm.kernels.attention.packing import Packing
from tests.conftest import IN_THE_INTERPRETER
from tests.kernels.attention_checks import (
    OPTIONS,
    check,
    check_decode,
    check_packed,
    each_backend,
    eager,
    plain_dtype,
    qkv,
)
from tests.numerics import DTYPES, assert_accurate, on_gpus

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


@IN_THE_INTERPRETER
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


@each_backend(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend, options, dtype):
    lengths = [(113, 203), (203, 113)] if backend == "cpu" else [(70, 150)]
    for size in lengths:
        check(qkv(*size, 4, 2, 24, dtype, batch=1), backend, **options)


@each_backend(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 20, "softcap": 3.0}], ids=str)
def test_sinks(backend, options, dtype):
    for size in ((40, 90), (90, 40)):
        check([*qkv(*size, 4, 2, 16, dtype, batch=2), torch.randn(4)], backend, **options)


def test_the_sink_of_a_query_that_sees_nothing(backend):
    q, k, v = qkv(5, 2, dtype=plain_dtype(backend), batch=1)
    sinks = torch.randn(2)
    out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    assert not out[:, :3].any()
    torch.testing.assert_close(lse[0, :, :3], sinks.unsqueeze(1).expand(2, 3))


def test_gradients_where_a_query_sees_nothing(backend):
    """Its lse is -inf, of which a masked square has the gradient NaN; a sink of -inf is no sink."""
    leaves = [
        t.requires_grad_() for t in (*qkv(60, 40, dtype=plain_dtype(backend), batch=1), torch.tensor([-torch.inf, 1.0]))
    ]
    *found, dsinks = gradients(leaves, lambda lse: torch.where(lse == -torch.inf, 0.0, lse * lse), backend)
    *expected, _ = gradients(leaves, lambda lse: lse.masked_fill(lse == -torch.inf, 0.0).square(), backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[0][:, :20, 0].any() and dsinks.isfinite().all() and dsinks[0] == 0
    assert all(g.isfinite().all() and g.any() for g in found)


def gradients(leaves, of_lse, backend):
    *inputs, sinks = leaves
    out, lse = flash_attention(*inputs, sinks=sinks, return_lse=True, backend=backend)
    return torch.autograd.grad(out.float().square().mean() + of_lse(lse).mean(), leaves)


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
def test_nothing(backend, shape):
    batch, seq_q, seq_k = shape
    leaves = [t.requires_grad_() for t in qkv(seq_q, seq_k, dtype=plain_dtype(backend), batch=batch)]
    out, lse = flash_attention(*leaves, return_lse=True, backend=backend)
    assert out.shape == leaves[0].shape and not out.any()
    assert lse.shape == (batch, 2, seq_q) and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert not any(t.grad.any() for t in leaves)


@each_backend(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9, "softcap": 2.0}], ids=str)
def test_packed_equals_unpacked(backend, options, dtype):
    lengths = [(1, 1), (70, 70), (0, 3), (5, 40), (33, 20), (4, 0), (100, 130), (0, 0), (0, 0)]
    if backend == "triton":
        lengths = [(1, 1), (40, 40), (0, 3), (5, 20), (13, 8), (4, 0), (0, 0), (0, 0)]
    check_packed(backend, lengths, options, dtype)


def test_one_cu_seqlens_serves_both(backend):
    q, k, v = (t[0] for t in qkv(50, 50, dtype=plain_dtype(backend), batch=1))
    cu = torch.tensor([0, 20, 50])
    call = partial(flash_attention, q, k, v, cu_seqlens_q=cu, backend=backend)
    both = call(cu_seqlens_k=cu, max_seqlen_q=30, max_seqlen_k=30)
    assert torch.equal(call(), both)
    longest = cu.diff().max()  # a tensor, as it is often computed
    assert torch.equal(call(max_seqlen_q=longest), both)


@pytest.mark.parametrize("cu", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 9], [0, -4, 5]], ids=str)
def test_cu_seqlens_that_are_wrong(any_backend, cu):
    q, k, v = (t[0] for t in qkv(5, 5, dtype=plain_dtype(any_backend), batch=1))
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to the 5 tokens"):
        flash_attention(q, k, v, cu_seqlens_q=torch.tensor(cu), backend=any_backend)


@pytest.mark.parametrize("side", ["q", "k"])
def test_a_max_seqlen_that_is_too_small(any_backend, side):
    q, k, v = (t[0] for t in qkv(50, 50, dtype=plain_dtype(any_backend), batch=1))
    cu, hints = torch.tensor([0, 20, 50]), {"max_seqlen_q": 30, "max_seqlen_k": 30, f"max_seqlen_{side}": 29}
    with pytest.raises(ValueError, match=f"max_seqlen_{side} must be at least the longest sequence, 30, not 29"):
        flash_attention(q, k, v, cu_seqlens_q=cu, **hints, backend=any_backend)


@IN_THE_INTERPRETER
def test_tokens_beyond_max_seqlen_are_nan():
    """On a GPU nobody looks at the lengths. What no program computes must not be left as it was."""
    triton_kernels = pytest.importorskip("fastllm.kernels.attention.triton_kernels")
    q, k, v = (t[0] for t in qkv(200, 200, 2, 1, 16, batch=1))
    cu, options = torch.tensor([0, 30, 200]), Options(0.25, UNBOUNDED, 0, 0.0)
    out, lse = torch.zeros_like(q), torch.zeros(2, 200)
    found = {}
    for most in (170, 64):  # 64: a tile of queries, two of keys
        packing = Packing(cu, cu, most, most)
        here, delta = torch.zeros_like(out), torch.zeros_like(lse)
        its_lse = torch.zeros_like(lse)
        triton_kernels.attention_forward(q, k, v, None, packing, options, "triton", here, its_lse)
        if most == 170:
            out.copy_(here)
            lse.copy_(its_lse)
        else:
            assert its_lse[:, 94:].isnan().all() and torch.equal(its_lse[:, :94], lse[:, :94])
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        given = (torch.ones_like(q), None, q, k, v, out, lse, packing, options, False, "triton")
        triton_kernels.attention_backward(*given, *grads, delta)
        found[most] = here, *grads
    for name, missed, whole in zip(("out", "dq", "dk", "dv"), found[64], found[170], strict=True):
        assert missed[94:].isnan().all() and not whole.isnan().any(), name
        torch.testing.assert_close(missed[:94], whole[:94], msg=lambda m, name=name: f"{name}: {m}")


def test_wrong_cu_seqlens_without_queries(backend):
    """Nothing runs forward; the backward pass must not read queries that are not there."""
    q, k, v = (t[0].requires_grad_() for t in qkv(0, 5, dtype=plain_dtype(backend), batch=1))
    cu = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"cu_seqlens_q must rise from 0 to the 0 tokens"):
        flash_attention(q, k, v, cu_seqlens_q=cu, backend=backend).sum().backward()


# Triton compiles each head dimension, dtype and set of options anew, which takes seconds; lengths and heads not.
TRITON_CASES = [
    *((dim, torch.bfloat16, {}) for dim in DIMS if dim not in (8, 111)),
    *((64, torch.bfloat16, options) for options in OPTIONS),
    *((dim, torch.bfloat16, {"causal": False}) for dim in (128, 256)),
    (128, torch.bfloat16, {"window": 100, "softcap": 5.0}),
    *((dim, torch.float16, {}) for dim in (59, 128)),
    *((dim, torch.float32, {}) for dim in (59, 64)),
]
SHAPES = [(dim, options) for dim, dtype, options in TRITON_CASES if dtype == torch.bfloat16]
GPU_CASES = [("triton", *case) for case in TRITON_CASES]
GPU_CASES += [("cuda", dim, dtype, options) for dim, options in SHAPES for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.gpu
@pytest.mark.parametrize(("gpu_backend", "dim", "dtype", "options"), GPU_CASES, ids=str)
def test_accuracy_on_gpus(gpu_backend, dim, dtype, options):
    for i, lengths in enumerate(LENGTHS):
        check(qkv(*lengths, *HEADS[i % 3], dim, dtype, batch=1, device="cuda"), gpu_backend, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("gpu_backend", "dtype", "options"), on_gpus([{}, {"window": 150, "softcap": 2.0}], DTYPES[1:]), ids=str
)
def test_packed_and_sinks_on_gpus(gpu_backend, dtype, options):
    check_packed(gpu_backend, [(1, 1), (300, 300), (0, 3), (5, 400), (133, 70), (4, 0)], options, dtype, "cuda")
    inputs = [*qkv(200, 300, 4, 2, 64, dtype, device="cuda"), torch.randn(4, device="cuda")]
    check(inputs, gpu_backend, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sequences_on_gpus(gpu_backend, dtype):
    """Against PyTorch's own kernels, by float64 for the last queries."""
    q, k, v = qkv(32768, 32768, 2, 1, 128, dtype, batch=1, device="cuda")
    out = flash_attention(q, k, v, backend=gpu_backend)
    exact = reference.flash_attention(q[:, -64:].double(), k.double(), v.double())[0]
    plain = eager(q[:, -64:], k, v)
    assert_accurate(out[:, -64:], plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["triton", "cuda"])
def test_packed_sequences_in_a_cuda_graph(gpu_backend):
    """With max_seqlen nothing waits for the GPU; a replay takes other lengths of the same number of tokens."""
    q, k, v = (t[0].cuda() for t in qkv(200, 200, 2, 1, 64, torch.bfloat16, batch=1))
    cu = torch.tensor([0, 30, 200], device="cuda")
    run = partial(flash_attention, q, k, v, cu_seqlens_q=cu, max_seqlen_q=200, backend=gpu_backend)
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for ends in ([0, 30, 200], [0, 150, 200]):
        cu.copy_(torch.tensor(ends))
        graph.replay()
        torch.testing.assert_close(out, run())
    if gpu_backend == "triton":  # CUDA C++ needs no max_seqlen
        out = flash_attention(q, k, v, cu_seqlens_q=cu, max_seqlen_q=64, backend=gpu_backend)
        assert out[134:150].isnan().any()
