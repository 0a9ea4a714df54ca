from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import RMSNorm, rms_norm, use_backend
from tests.numerics import DTYPES, assert_accurate, long_row, on_gpus, with_gradients


def inputs(shape, dtype, weight="same", residual=False, seed=0) -> tuple[list[Tensor | None], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    w = {
        "none": None,
        "same": 1 + 0.3 * normal(shape[-1]),
        "float32": 1 + 0.3 * torch.randn(shape[-1], generator=generator),
    }
    return [normal(*shape), w[weight], normal(*shape) if residual else None], [normal(*shape), normal(*shape)]


def call(x, weight, residual, **options):
    return rms_norm(x, weight, residual=residual, **options)


def check(tensors, grads, backend, **options) -> None:
    x, weight, residual = tensors
    exact_inputs = tensors
    if residual is not None:
        # What is normalised is the sum rounded to the dtype, so the exact result starts from that.
        exact_inputs = [(x + residual).double(), weight, torch.zeros_like(x).double()]
    exact = with_gradients(partial(call, backend="torch", **options), exact_inputs, grads, Tensor.double)
    eager = with_gradients(partial(call, backend="torch", **options), tensors, grads)
    actual = with_gradients(partial(call, backend=backend, **options), tensors, grads)
    dx_terms, dweight_terms = terms(exact_inputs[0].double(), weight, *grads[: 1 if residual is None else 2], **options)
    names = ["y"] if residual is None else ["y", "h"]
    names += ["dx"] if weight is None else ["dx", "dweight"]
    names += [] if residual is None else ["dresidual"]
    known = {"dx": dx_terms, "dresidual": dx_terms, "dweight": dweight_terms}
    for name, a, b, c in zip(names, actual, eager, exact, strict=True):
        assert_accurate(a, b, c, name, known.get(name))


def terms(h, weight, dy, dh=None, *, eps=1e-6, weight_offset=0.0) -> tuple[Tensor, Tensor]:
    """The magnitudes that dx and dweight add up."""
    xhat = (h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()).abs()
    g = dy.double().abs() * (1 if weight is None else (weight.double() + weight_offset).abs())
    rstd = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    dx = rstd * (g + xhat * (g * xhat).mean(-1, keepdim=True)) + (0 if dh is None else dh.double().abs())
    return dx, (dy.double().abs() * xhat).flatten(0, -2).sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 64), (2, 3, 100), (33, 128), (3, 1000), (9, 1024), (2, 4099)])
def test_accuracy(backend, shape, dtype):
    check(*inputs(shape, dtype, residual=True), backend)


@pytest.mark.parametrize("cols", [8192, 16385, 65536, 262144])
def test_long_rows(backend, cols):
    check(*inputs((3, long_row(backend, cols)), torch.bfloat16), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["none", "same", "float32"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_arguments(backend, dtype, weight, residual, weight_offset):
    check(*inputs((6, 72), dtype, weight, residual), backend, weight_offset=weight_offset, eps=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cols", "weight"), [(40008, "float32"), (17000, "none"), (140000, "same")])
def test_arguments_on_long_rows(backend, cols, weight, dtype):
    """More rows than a GPU of few multiprocessors has at once, each in the registers of several blocks."""
    check(*inputs((5, long_row(backend, cols)), dtype, weight, residual=True), backend, weight_offset=1.0)


def test_many_rows(backend):
    """More rows than programs, blocks or partial sums, and not a multiple of them."""
    check(*inputs((1237, 40), torch.float32), backend)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0, 16)])
def test_no_rows(backend, shape):
    tensors, grads = inputs(shape, torch.float32, residual=True)
    y, h, dx, dweight, dresidual = with_gradients(partial(call, backend=backend), tensors, grads)
    assert y.shape == h.shape == dx.shape == dresidual.shape == shape
    assert torch.equal(dweight, torch.zeros(16))


def views() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 3 * 48).to(torch.bfloat16)
    return {
        "heads of a fused projection": x.unflatten(-1, (9, 16))[:, :, 3:6],
        "columns cut out": x[..., 5:37],
        "every other row": x[:, ::2],
        "transposed rows": x.transpose(0, 1),
        "three strides": x.unflatten(-1, (9, 16))[::2, ::2, ::2],
        "strided columns": x[..., ::2],
        "one row repeated": x[:1, :1].expand(3, 5, -1),
    }


@pytest.mark.parametrize("name", views())
def test_strides(backend, name):
    """By the rule for numerics: rows that are not aligned may be summed in another order than aligned ones."""
    x = views()[name]
    check([x, torch.randn(x.shape[-1]).to(x.dtype), x], [x, x], backend)


def test_inputs_are_not_changed(backend):
    tensors, grads = inputs((5, 33), torch.float32, residual=True)
    before = [t.clone() for t in (*tensors, *grads)]
    with_gradients(partial(call, backend=backend), tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, *grads), strict=True))


def test_only_what_is_wanted(backend):
    """Gradients of some inputs alone, of one output alone, and of an output that is not used."""
    (x, w, r), (g, _) = inputs((4, 24), torch.float32, residual=True)
    for wanted in ("x", "w", "r"):
        leaves = {"x": x.clone(), "w": w.clone(), "r": r.clone()}
        leaves[wanted].requires_grad_()
        y, h = rms_norm(leaves["x"], leaves["w"], residual=leaves["r"], backend=backend)
        y.backward(g, retain_graph=True)
        assert leaves[wanted].grad is not None
        assert all(t.grad is None for name, t in leaves.items() if name != wanted)
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, w, residual=r, backend=backend)[1].backward(g)
    assert torch.equal(leaf.grad, g)


@pytest.mark.parametrize("cols", [40, 40000])
def test_infinities_stay_in_their_rows(backend, cols):
    (x, w, _), _ = inputs((4, long_row(backend, cols)), torch.float32)
    clean = rms_norm(x, w, backend=backend)
    x[2, 7] = float("nan")
    y = rms_norm(x, w, backend=backend)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_large_and_small_values(backend):
    for scale in (1e-30, 1e15):
        (x, w, _), grads = inputs((3, 64), torch.float32)
        check([x * scale, w, None], grads, backend, eps=0.0 if scale > 1 else 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    weight=st.sampled_from(["none", "same", "float32"]),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_on_the_cpu(rows, cols, dtype, weight, residual, seed):
    check(*inputs((rows, cols), dtype, weight, residual, seed), "cpu")


def test_weight_gradient_is_deterministic(backend):
    tensors, grads = inputs((400, 96), torch.float32)
    first, second = (with_gradients(partial(call, backend=backend), tensors, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weight_gradient_does_not_depend_on_threads():
    tensors, grads = inputs((2000, 96), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(with_gradients(partial(call, backend="cpu"), tensors, grads)[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", [(37, 64), (5, 1000), (3, 8192), (2, 40001)])
def test_cuda_threads_in_any_order(simt, shape, seed):
    """A barrier that was missing would show: the emulator runs threads and blocks in another order."""
    tensors, grads = inputs(shape, torch.bfloat16, residual=True)
    in_order = with_gradients(partial(call, backend="cuda"), tensors, grads)
    simt.set_seed(seed)
    try:
        shuffled = with_gradients(partial(call, backend="cuda"), tensors, grads)
    finally:
        simt.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


def test_module_has_torchs_parameters():
    ours, theirs = RMSNorm(48, eps=1e-5), torch.nn.RMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(RMSNorm(8, weight_offset=1.0).weight, torch.zeros(8))


BAD = {
    "not a tensor": (lambda x, w: rms_norm([1.0], w), TypeError, "x must be a torch.Tensor"),
    "integers": (lambda x, w: rms_norm(x.int(), w), TypeError, "x must be float32"),
    "scalar": (lambda x, w: rms_norm(x[0, 0], w), ValueError, "at least 1 dimension"),
    "no columns": (lambda x, w: rms_norm(x[:, :0], None), ValueError, "at least one column"),
    "weight too short": (lambda x, w: rms_norm(x, w[:-1]), ValueError, r"weight must have shape \[16\], it has \[15\]"),
    "weight's dtype": (lambda x, w: rms_norm(x, w.double()), TypeError, "weight is float64 but x is float32"),
    "weight elsewhere": (lambda x, w: rms_norm(x, w.to("meta")), ValueError, "weight is on meta but x is on cpu"),
    "residual's shape": (lambda x, w: rms_norm(x, w, residual=x[:1]), ValueError, "residual must have shape"),
    "residual's dtype": (lambda x, w: rms_norm(x, w, residual=x.double()), TypeError, "residual is float64"),
    "sparse": (lambda x, w: rms_norm(x.to_sparse(), w), TypeError, "dense"),
    "unknown backend": (lambda x, w: rms_norm(x, w, backend="cudnn"), ValueError, "unknown backend 'cudnn'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("preferred", ["torch", "cpu", "triton", "cuda"])
def test_bad_input(simt, case, preferred):
    bad, error, message = BAD[case]
    with use_backend(preferred), pytest.raises(error, match=message):
        bad(torch.randn(4, 16), torch.randn(16))


def test_gradcheck():
    x, w, r = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 7), (7,), (3, 7)])
    assert torch.autograd.gradcheck(partial(call, backend="torch", weight_offset=0.5), (x, w, r))
    assert torch.autograd.gradgradcheck(partial(call, backend="torch"), (x, w, r))


def test_double_backward_raises(backend):
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"rms_norm: its kernels have no second derivative.*backend='torch'"):
        dx.sum().backward()


def test_opcheck(backend):
    for dtype, weight, residual in [(torch.float32, "same", True), (torch.bfloat16, "none", False)]:
        (x, w, r), (dy, dh) = inputs((2, 3, 16), dtype, weight, residual)
        y, h, rstd = torch.ops.fastllm.rms_norm_forward(x, w, r, 1e-6, 0.0, True, backend)
        for differentiated in (False, True):
            args = (x, w, r, 1e-6, 0.0, differentiated, backend)
            torch.library.opcheck(torch.ops.fastllm.rms_norm_forward, args)
        args = (dy, x, w, rstd, dh if residual else None, 0.0, w is not None, backend)
        torch.library.opcheck(torch.ops.fastllm.rms_norm_backward, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    """One graph, no breaks; the same numbers as without compile."""
    torch._dynamo.reset()

    def layer(x, w, r):
        y, h = rms_norm(x, w, residual=r, backend=backend)
        return torch.sin(y), h * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        tensors, grads = inputs((rows, 32), torch.float32, residual=True)
        for got, expected in zip(
            with_gradients(compiled, tensors, grads), with_gradients(layer, tensors, grads), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_compile_with_inductor():
    torch._dynamo.reset()
    tensors, grads = inputs((6, 32), torch.float32)
    compiled = torch.compile(lambda x, w: rms_norm(x * 2, w) + 1, fullgraph=True)
    plain = with_gradients(lambda x, w: rms_norm(x * 2, w) + 1, tensors[:2], grads)
    for got, expected in zip(with_gradients(compiled, tensors[:2], grads), plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RMSNorm(16)

        def forward(self, x):
            return self.norm(x)

    layer, x = Layer(), torch.randn(3, 16)
    program = torch.export.export(layer, (x,))
    assert "fastllm.rms_norm_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend_on_gpu", "dtype", "shape"),
    on_gpus([(1, 1), (7, 3), (5, 64), (4096, 128), (33, 1000), (257, 4096), (64, 8192), (9, 65536), (3, 262144)]),
    ids=str,
)
def test_on_a_gpu(backend_on_gpu, dtype, shape):
    tensors, grads = inputs(shape, dtype, residual=True)
    check([t.cuda() for t in tensors], [g.cuda() for g in grads], backend_on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("name", views())
def test_strides_on_a_gpu(backend_on_gpu, name):
    x = views()[name].cuda()
    check([x, torch.randn(x.shape[-1], device="cuda").to(x.dtype), x], [x, x], backend_on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_compile_on_a_gpu(backend_on_gpu):
    torch._dynamo.reset()
    tensors, grads = inputs((64, 512), torch.bfloat16, residual=True)
    tensors, grads = [t.cuda() for t in tensors], [g.cuda() for g in grads]
    plain = partial(call, backend=backend_on_gpu)
    compiled = torch.compile(plain, fullgraph=True)
    for got, expected in zip(
        with_gradients(compiled, tensors, grads), with_gradients(plain, tensors, grads), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_more_than_2_31_elements_on_a_gpu(backend_on_gpu):
    """Offsets beyond 32 bits: the last row must come out like the first."""
    x = torch.zeros(2**31 // 4096 + 8, 4096, dtype=torch.bfloat16, device="cuda")
    x[0] = x[-1] = torch.randn(4096, device="cuda").bfloat16()
    x.requires_grad_()
    y = rms_norm(x, backend=backend_on_gpu)
    assert torch.equal(y[0], y[-1])
    y.backward(x.detach())
    assert torch.equal(x.grad[0], x.grad[-1])
