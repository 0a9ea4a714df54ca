"""The kernels of ``rope`` and ``swiglu``; the specifications themselves are tested in test_specifications.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import explain, native, rope, swiglu
from tests.numerics import DTYPES, assert_accurate, with_gradients

pytestmark = pytest.mark.skipif("cpu" not in native.KERNELS, reason="no native module")


@pytest.fixture(params=native.KERNELS["cpu"].instruction_sets() if "cpu" in native.KERNELS else [])
def instruction_set(request):
    cpu = native.KERNELS["cpu"]
    best = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(best)


def check(call, tensors, grads, terms=None) -> None:
    exact = with_gradients(partial(call, backend="torch"), tensors, grads, Tensor.double)
    eager = with_gradients(partial(call, backend="torch"), tensors, grads)
    actual = with_gradients(partial(call, backend="cpu"), tensors, grads)
    for i, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_accurate(a, b, c, f"result {i}", None if terms is None else terms[i])


# ---- swiglu ----


def swiglu_terms(gate, up, dout) -> list[Tensor]:
    """Magnitudes added up on the way: 1 + x(1 - sigmoid) cancels where the derivative of silu is 0."""
    g, u, d = (t.double().abs() for t in (gate, up, dout))
    return [g * u, d * u * (1 + g), d * g]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (5, 64), (2, 3, 100), (33, 129)])
def test_swiglu_accuracy(instruction_set, shape, dtype):
    tensors = [(4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)]
    grad = torch.randn(shape).to(dtype)
    check(swiglu, tensors, [grad], swiglu_terms(*tensors, grad))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), cols=st.integers(0, 300), dtype=st.sampled_from(DTYPES), spread=st.floats(0.01, 30))
def test_swiglu_any_shape(rows, cols, dtype, spread):
    tensors = [(spread * torch.randn(rows, cols)).to(dtype), torch.randn(rows, cols).to(dtype)]
    grad = torch.randn(rows, cols).to(dtype)
    check(swiglu, tensors, [grad], swiglu_terms(*tensors, grad))


def test_swiglu_far_out(instruction_set):
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.4, 0.0, 88.5, 200.0, 1e30, float("inf"), float("nan")])
    got = swiglu(gate, torch.ones(10), backend="cpu")
    expected = torch.nn.functional.silu(gate.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-36, equal_nan=True)


def test_swiglu_halves_of_one_projection():
    both = torch.randn(3, 5, 2 * 24)
    gate, up = both.chunk(2, -1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


# ---- rope ----


def rope_inputs(batch=2, seq=5, heads=6, kv_heads=2, dim=16, rotary=16, dtype=torch.float32):
    q, k = torch.randn(batch, seq, heads, dim).to(dtype), torch.randn(batch, seq, kv_heads, dim).to(dtype)
    angle = 100 * torch.randn(seq + 3, rotary // 2)
    return [q, k], angle.cos(), angle.sin(), [torch.randn_like(q), torch.randn_like(k)]


def rope_call(cos, sin, positions=None):
    return lambda q, k, backend: rope(q, k, cos, sin, positions=positions, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(2, 2), (16, 16), (40, 24), (64, 64), (80, 80), (128, 128), (256, 64)])
@pytest.mark.parametrize("positioned", [False, True])
def test_rope_accuracy(instruction_set, dtype, dim, rotary, positioned):
    tensors, cos, sin, grads = rope_inputs(dim=dim, rotary=rotary, dtype=dtype)
    positions = torch.tensor([[4, 0, 7, 7, 1], [0, 1, 2, 3, 4]]) if positioned else None
    check(rope_call(cos, sin, positions), tensors, grads)


def test_rope_of_heads_cut_out_of_a_projection():
    x = torch.randn(2, 5, (6 + 2 + 2) * 16)
    q, k, _ = x.unflatten(-1, (10, 16)).split([6, 2, 2], dim=2)
    _, cos, sin, _ = rope_inputs()
    for got, expected in zip(rope(q, k, cos, sin), rope(q.contiguous(), k.contiguous(), cos, sin), strict=True):
        assert torch.equal(got, expected)


def test_rope_positions_outside_the_tables_raise():
    (q, k), cos, sin, _ = rope_inputs()
    for wrong in (8, -1):
        positions = torch.full((2, 5), wrong)
        with pytest.raises(IndexError, match=f"positions holds {wrong}, cos and sin hold 8 positions"):
            rope(q, k, cos, sin, positions=positions)


def test_rope_says_what_its_kernel_leaves_to_pytorch():
    (q, k), cos, sin, _ = rope_inputs()
    assert explain(rope, q, k, cos, sin).chosen == "cpu"
    assert "interleaved" in explain(rope, q, k, cos, sin, interleaved=True).reasons["cpu"]
    assert explain(rope, q, k, cos.requires_grad_(), sin).chosen == "torch"


def test_rope_can_be_differentiated_twice():
    (q, k), cos, sin, _ = rope_inputs()
    results = []
    for backend in ("cpu", "torch"):
        leaf = q.clone().requires_grad_()
        (dq,) = torch.autograd.grad(rope(leaf, k, cos, sin, backend=backend)[0].pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(dq.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ---- both ----


def test_no_rows():
    assert swiglu(torch.randn(0, 8), torch.randn(0, 8), backend="cpu").shape == (0, 8)
    (q, k), cos, sin, _ = rope_inputs(batch=0)
    assert rope(q, k, cos, sin, backend="cpu")[1].shape == k.shape


def test_double_backward_of_swiglu_raises():
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(swiglu(x, x.detach()).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu: its kernels have no second derivative"):
        dx.sum().backward()


def test_opcheck():
    x = torch.randn(3, 8)
    torch.library.opcheck(torch.ops.fastllm.swiglu_forward, (x, x + 1, "cpu"))
    torch.library.opcheck(torch.ops.fastllm.swiglu_backward, (x, x + 1, x - 1, "cpu"))
    (q, _), cos, sin, _ = rope_inputs()
    for positions in (None, torch.zeros(2, 5, dtype=torch.int64)):
        torch.library.opcheck(torch.ops.fastllm.rope, (q, cos, sin, positions, False, "cpu"))


def test_compile():
    torch._dynamo.reset()

    def layer(q, k, cos, sin):
        q, k = rope(q * 2, k, cos, sin)
        return swiglu(q.flatten(-2), q.flatten(-2) + 1), k

    (q, k), cos, sin, _ = rope_inputs()
    grads = [torch.randn(2, 5, 96), torch.randn_like(k)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plain = with_gradients(lambda q, k: layer(q, k, cos, sin), [q, k], grads)
    for got, expected in zip(with_gradients(lambda q, k: compiled(q, k, cos, sin), [q, k], grads), plain, strict=True):
        torch.testing.assert_close(got, expected)
