"""The kernels of ``rope`` and ``swiglu``; the specifications themselves are tested in test_specifications.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import explain, rope, swiglu
from tests.numerics import DTYPES, assert_accurate, on_gpus, with_gradients


def check(call, tensors, grads, backend, terms=None) -> None:
    exact = with_gradients(partial(call, backend="torch"), tensors, grads, Tensor.double)
    eager = with_gradients(partial(call, backend="torch"), tensors, grads)
    actual = with_gradients(partial(call, backend=backend), tensors, grads)
    for i, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_accurate(a, b, c, f"result {i}", None if terms is None else terms[i])


# ---- swiglu ----


def check_swiglu(shape, dtype, backend, spread=4.0, device="cpu") -> None:
    gate, up, dout = (factor * torch.randn(shape, device=device) for factor in (spread, 1, 1))
    gate, up, dout = (t.to(dtype) for t in (gate, up, dout))
    g, u, d = (t.double().abs() for t in (gate, up, dout))
    # Magnitudes added up on the way: 1 + x(1 - sigmoid) cancels where the derivative of silu is 0.
    check(swiglu, [gate, up], [dout], backend, [g * u, d * u * (1 + g), d * g])


SHAPES = [(1,), (7, 3), (5, 64), (2, 3, 100), (33, 129), (3, 4104), (2, 5000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_accuracy(backend, shape, dtype):
    check_swiglu(shape, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_on_instruction_sets(instruction_set, dtype):
    for shape in SHAPES:
        check_swiglu(shape, dtype, "cpu")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 40), cols=st.integers(0, 300), dtype=st.sampled_from(DTYPES), spread=st.floats(0.01, 30))
def test_swiglu_any_shape(backend, rows, cols, dtype, spread):
    check_swiglu((rows, cols), dtype, backend, spread)


def check_swiglu_far_out(backend) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.4, 0.0, 88.5, 200.0, 1e30, float("inf"), float("nan")])
    got = swiglu(gate, torch.ones(10), backend=backend)
    expected = torch.nn.functional.silu(gate.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-36, equal_nan=True)


def test_swiglu_far_out(backend):
    check_swiglu_far_out(backend)


def test_swiglu_far_out_on_instruction_sets(instruction_set):
    check_swiglu_far_out("cpu")


@pytest.mark.parametrize("hidden", [24, 21])
def test_swiglu_halves_of_one_projection(backend, hidden):
    call = partial(swiglu, backend=backend)
    gate, up = torch.randn(3, 5, 2 * hidden).chunk(2, -1)
    torch.testing.assert_close(call(gate, up), call(gate.contiguous(), up.contiguous()), rtol=0, atol=0)
    grad = torch.randn(3, hidden, 5).transpose(1, 2)  # not contiguous either
    for a, b in zip(
        with_gradients(call, [gate, up], [grad]),
        with_gradients(call, [gate.contiguous(), up.contiguous()], [grad.contiguous()]),
        strict=True,
    ):
        assert torch.equal(a, b)


# ---- rope ----


def rope_inputs(batch=2, seq=5, heads=6, kv_heads=2, dim=16, rotary=16, dtype=torch.float32, device="cpu"):
    shapes = ((batch, seq, heads, dim), (batch, seq, kv_heads, dim))
    q, k, dq, dk = (torch.randn(s, device=device).to(dtype) for s in (*shapes, *shapes))
    angle = 100 * torch.randn(seq + 3, rotary // 2, device=device)
    return [q, k], angle.cos(), angle.sin(), [dq, dk]


def rope_call(cos, sin, **options):
    return lambda q, k, backend: rope(q, k, cos, sin, backend=backend, **options)


def check_rope(backend, dim, rotary, dtype, device="cpu", **sizes) -> None:
    tensors, cos, sin, grads = rope_inputs(dim=dim, rotary=rotary, dtype=dtype, device=device, **sizes)
    batch, seq = tensors[0].shape[:2]
    for interleaved in (False, True):
        for positions in (None, torch.randint(seq + 3, (batch, seq), device=device)):
            check(rope_call(cos, sin, positions=positions, interleaved=interleaved), tensors, grads, backend)


ROTARY = [(2, 2), (5, 2), (16, 16), (40, 24), (64, 64), (80, 80), (128, 128), (256, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary"), ROTARY)
def test_rope_accuracy(backend, dtype, dim, rotary):
    check_rope(backend, dim, rotary, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_on_instruction_sets(instruction_set, dtype):
    for dim, rotary in ROTARY:
        check_rope("cpu", dim, rotary, dtype)


def test_rope_of_many_heads_and_tokens(backend):
    check_rope(backend, 64, 64, torch.bfloat16, batch=2, seq=17, heads=37, kv_heads=1)


def test_rope_of_heads_cut_out_of_a_projection(backend):
    x = torch.randn(2, 5, (6 + 2 + 2) * 16)
    q, k, _ = x.unflatten(-1, (10, 16)).split([6, 2, 2], dim=2)
    _, cos, sin, _ = rope_inputs()
    call = partial(rope, cos=cos, sin=sin, backend=backend)
    for got, expected in zip(call(q, k), call(q.contiguous(), k.contiguous()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 8])
def test_rope_in_place(backend, interleaved, rotary):
    x = torch.randn(2, 5, (6 + 2 + 2) * 16)
    before = x.clone()
    q, k, v = x.unflatten(-1, (10, 16)).split([6, 2, 2], dim=2)
    _, cos, sin, _ = rope_inputs(rotary=rotary)
    call = partial(rope, cos=cos, sin=sin, interleaved=interleaved, backend=backend)
    expected = call(q, k)
    got = call(q, k, inplace=True)
    assert got[0].data_ptr() == q.data_ptr() and got[1].data_ptr() == k.data_ptr()
    for a, b, c in zip(got, expected, (q, k), strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)
    assert torch.equal(v.flatten(-2), before[..., 8 * 16 :])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rope_in_place_of_what_cannot_be_addressed_in_rows(backend):
    """Copied, turned, and copied back."""
    q, k = torch.randn(2, 5, 16, 6).transpose(2, 3), torch.randn(2, 5, 16, 6).transpose(2, 3)
    _, cos, sin, _ = rope_inputs()
    expected = rope(q, k, cos, sin, backend=backend)
    rope(q, k, cos, sin, inplace=True, backend=backend)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_rope_in_place_has_its_gradients(backend):
    (q, k), cos, sin, grads = rope_inputs()

    def call(x, inplace, backend):
        heads = (2 * x).unflatten(-1, (8, 16))
        q, k = rope(heads[:, :, :6], heads[:, :, 6:], cos, sin, inplace=inplace, backend=backend)
        return q, k, heads.sum((2, 3))  # what became of the projection

    x = torch.cat([q, k], 2).flatten(2)
    more = [*grads, torch.randn(2, 5)]
    got = with_gradients(partial(call, inplace=True, backend=backend), [x], more)
    expected = with_gradients(partial(call, inplace=True, backend="torch"), [x], more)
    torch.testing.assert_close(got, expected)


def test_rope_in_place_refuses_before_it_writes(backend):
    """Leaves and their views, and memory that two elements share, which would be turned twice."""
    (q, k), cos, sin, _ = rope_inputs()
    call = partial(rope, cos=cos, sin=sin, inplace=True, backend=backend)
    memory = torch.randn(2 * 5 * 8 * 16 + 16)
    fused = memory[: 2 * 5 * 8 * 16].view(2, 5, 8, 16)
    wide = torch.randn(2, 5, 2 * 16)
    for wrong, error, message in [
        ((q.clone().requires_grad_(), k), RuntimeError, "leaf Variable that requires grad"),
        ((q.clone().requires_grad_()[:], k), RuntimeError, "view of a leaf Variable"),
        ((q, k.clone().requires_grad_()), RuntimeError, "leaf Variable that requires grad"),
        ((2 * q.clone().requires_grad_()).split([3, 3], 2), RuntimeError, "multiple views"),
        ((q, k[:, :, :1].expand(2, 5, 4, 16)), ValueError, "elements of k share memory"),
        ((q[:1].expand(2, 5, 6, 16), k), ValueError, "elements of q share memory"),
        ((wide.as_strided((2, 5, 2, 16), (160, 32, 8, 1)), k), ValueError, "elements of q share memory"),
        ((q, q), ValueError, "q and k share memory"),
        ((fused[:, :, :6], fused[:, :, 5:7]), ValueError, "q and k share memory"),
        ((fused[:, :, :6], memory[16:].view(2, 5, 8, 16)[:, :, 6:8]), ValueError, "q and k share memory"),
    ]:
        before = [t.detach().clone() for t in wrong]
        with pytest.raises(error, match=message):
            call(*wrong)
        if message != "q and k share memory":
            assert all(torch.equal(a.detach(), b) for a, b in zip(wrong, before, strict=True))
    ends = torch.randn(5, 2, 16, 2)  # two tensors element by element, of which none is shared
    q, k = (ends[..., i].unsqueeze(0) for i in range(2))
    expected = rope(q, k, cos, sin, backend=backend)
    for got, right in zip(call(q, k), expected, strict=True):
        assert torch.equal(got, right)


def test_rope_positions_outside_the_tables_raise():
    (q, k), cos, sin, _ = rope_inputs()
    for wrong in (8, -1):
        positions = torch.full((2, 5), wrong)
        with pytest.raises(IndexError, match=f"positions holds {wrong}, cos and sin hold 8 positions"):
            rope(q, k, cos, sin, positions=positions, backend="cpu")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_positions_outside_the_tables_are_nan_on_gpus(backend, interleaved):
    if backend == "cpu":
        return
    (q, k), cos, sin, _ = rope_inputs(rotary=8)
    positions = torch.tensor([[0, 8, 1, -1, 2], [2**40, 3, -(2**40), 4, 5]])
    good, outside = (positions >= 0) & (positions < 8), (positions < 0) | (positions >= 8)
    got, _ = rope(q, k, cos, sin, positions=positions, interleaved=interleaved, backend=backend)
    expected, _ = rope(q, k, cos, sin, positions=positions.clamp(0, 7), interleaved=interleaved, backend="torch")
    torch.testing.assert_close(got[good], expected[good])
    assert bool(got[outside][..., :8].isnan().all()) and torch.equal(got[outside][..., 8:], q[outside][..., 8:])


def test_rope_says_what_its_kernel_leaves_to_pytorch():
    (q, k), cos, sin, _ = rope_inputs()
    assert explain(rope, q, k, cos, sin, interleaved=True).chosen == "cpu"
    assert explain(rope, q, k, cos.requires_grad_(), sin).chosen == "torch"


def test_rope_can_be_differentiated_twice(backend):
    (q, k), cos, sin, _ = rope_inputs()
    results = []
    for b in (backend, "torch"):
        leaf = q.clone().requires_grad_()
        (dq,) = torch.autograd.grad(rope(leaf, k, cos, sin, backend=b)[0].pow(3).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(dq.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# ---- both ----


def test_no_rows(backend):
    assert swiglu(torch.randn(0, 8), torch.randn(0, 8), backend=backend).shape == (0, 8)
    (q, k), cos, sin, _ = rope_inputs(batch=0)
    assert rope(q, k, cos, sin, backend=backend)[1].shape == k.shape
    (q, k), cos, sin, _ = rope_inputs(rotary=0)
    assert torch.equal(rope(q, k, cos, sin, backend=backend)[0], q)


def test_order_of_threads_does_not_matter(simt):
    gate, up, dout = (torch.randn(9, 520) for _ in range(3))
    (q, k), cos, sin, grads = rope_inputs(seq=30)
    results = []
    try:
        for seed in (0, 1, 2):
            simt.set_seed(seed)
            results.append(with_gradients(partial(swiglu, backend="cuda"), [gate, up], [dout]))
            results[-1] += with_gradients(partial(rope, cos=cos, sin=sin, backend="cuda"), [q, k], grads)
    finally:
        simt.set_seed(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_double_backward_of_swiglu_raises(backend):
    x = torch.randn(3, 8, requires_grad=True)
    out = swiglu(x, x.detach(), backend=backend)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu: its kernels have no second derivative"):
        dx.sum().backward()


def test_opcheck(backend):
    x = torch.randn(3, 8)
    torch.library.opcheck(torch.ops.fastllm.swiglu_forward, (x, x + 1, backend))
    torch.library.opcheck(torch.ops.fastllm.swiglu_backward, (x, x + 1, x - 1, backend))
    (q, _), cos, sin, _ = rope_inputs()
    for positions in (None, torch.zeros(2, 5, dtype=torch.int64)):
        for op in (torch.ops.fastllm.rotate, torch.ops.fastllm.rotate_):
            torch.library.opcheck(op, (q, cos, sin, positions, False, False, backend))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile(backend, inplace):
    torch._dynamo.reset()

    def layer(q, k, cos, sin):
        q, k = rope(q * 2, k * 1, cos, sin, inplace=inplace, backend=backend)
        return swiglu(q.flatten(-2), q.flatten(-2) + 1, backend=backend), k

    (q, k), cos, sin, _ = rope_inputs()
    grads = [torch.randn(2, 5, 96), torch.randn_like(k)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plain = with_gradients(lambda q, k: layer(q, k, cos, sin), [q, k], grads)
    for got, expected in zip(with_gradients(lambda q, k: compiled(q, k, cos, sin), [q, k], grads), plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_swiglu_of_huge_and_tiny_gates_in_cuda(simt):
    """The sigmoid is computed by an approximate reciprocal: nowhere may that give 0, infinity or NaN of its own."""
    sizes = [0.0, 1e-45, 1e-38, 1e-3, 1.0, 17.0, 50.0, *torch.linspace(80, 110, 301).tolist(), 1e4, 1.7e38, 3.4e38]
    gate = torch.tensor([*sizes, *(-size for size in sizes), torch.inf, -torch.inf, torch.nan])
    up = torch.full_like(gate, 0.75)
    ours = with_gradients(partial(swiglu, backend="cuda"), [gate, up], [torch.ones_like(gate)])
    eager = with_gradients(lambda g, u: torch.nn.functional.silu(g) * u, [gate, up], [torch.ones_like(gate)])
    exact = with_gradients(
        lambda g, u: torch.nn.functional.silu(g) * u, [gate, up], [torch.ones_like(gate)], Tensor.double
    )
    for what, a, e, x in zip(("out", "dgate", "dup"), ours, eager, exact, strict=True):
        real = gate.isfinite()
        torch.testing.assert_close(a[~real], e[~real], rtol=0, atol=0, equal_nan=True, msg=what)
        steps = 2.0**-149 * (1 + gate.double().abs())  # exp(-|gate|) is a multiple of 2^-149
        within = (a.double() - x).abs() <= 8 * torch.finfo(torch.float32).eps * x.abs() + steps
        assert bool((within | ~real).all()), (what, gate[~within & real])


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(("gpu_backend", "dtype", "shape"), on_gpus([*SHAPES, (64, 14336), (4097, 11008)]), ids=str)
def test_swiglu_on_gpus(gpu_backend, dtype, shape):
    check_swiglu(shape, dtype, gpu_backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("gpu_backend", "dtype", "dims"), on_gpus(ROTARY), ids=str)
def test_rope_on_gpus(gpu_backend, dtype, dims):
    check_rope(gpu_backend, *dims, dtype, device="cuda", batch=3, seq=70, heads=37, kv_heads=1)
