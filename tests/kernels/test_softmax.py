from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import explain, softmax, use_backend
from tests.numerics import DTYPES, assert_accurate, long_row, on_gpus, with_gradients


def inputs(shape, dtype, seed=None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return (3 * x).to(dtype), g.to(dtype)


def check(x, g, backend, **options) -> None:
    """By the rule for numerics: y, where the float32 sum that divides it is allowed a rounding step of its own;
    and dx, as a function of dy and of the y that came out, from which it is computed."""
    exact_options = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    y, dx = with_gradients(partial(softmax, backend=backend, **options), [x], [g])
    exact = softmax(x.double(), backend="torch", **exact_options)
    assert_accurate(y, softmax(x, backend="torch", **options), exact, "y", exact)
    scale, wide, dy = options.get("scale", 1.0), y.double(), g.double()
    exact_dx = scale * wide * (dy - (wide * dy).sum(-1, keepdim=True))
    terms = abs(scale) * wide * (dy.abs() + (wide * dy.abs()).sum(-1, keepdim=True))
    assert_accurate(dx, torch._softmax_backward_data(g, y, -1, y.dtype) * scale, exact_dx, "dx", terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 64), (2, 3, 100), (33, 128), (3, 1000), (9, 1024), (2, 4099)])
def test_accuracy(backend, shape, dtype):
    check(*inputs(shape, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [8192, 16385, 20000, 40000, 65536, 131080, 262144, 300007])
def test_long_rows(backend, cols, dtype):
    """Rows beyond registers and one block, where maximum and sum are kept up to date (online)."""
    x, g = inputs((3, long_row(backend, cols)), dtype)
    x[0] = x[0].sort().values  # the maximum moves at every step
    check(x, g, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (4, 33, 70), (2, 7, 3), (1, 9), (3, 1, 40), (2, 36, 1030)])
def test_causal(backend, shape, dtype):
    check(*inputs(shape, dtype), backend, causal=True, scale=0.25)


def test_causal_long_rows(backend):
    check(*inputs((2, 3, long_row(backend, 70000)), torch.float32), backend, causal=True)


def test_rows_before_the_first_column_see_nothing(backend):
    x, g = inputs((2, 5, 3), torch.float32)
    y, dx = with_gradients(partial(softmax, causal=True, backend=backend), [x], [g])
    assert torch.equal(y[:, :2], torch.zeros(2, 2, 3))
    assert torch.equal(dx[:, :2], torch.zeros(2, 2, 3))
    torch.testing.assert_close(y[:, 2:].sum(-1), torch.ones(2, 3))


MASKS = ["whole", "row", "per batch", "keys of a batch", "queries", "of a head", "one", "transposed", "five dimensions"]


def masked(name: str, dtype: torch.dtype, cols: int = 37) -> tuple[Tensor, Tensor]:
    """(x, a boolean mask that is broadcast to it), where each row sees something."""
    x = 3 * torch.randn(2, 3, 5, cols)
    mask = {
        "whole": lambda: torch.rand(2, 3, 5, cols) < 0.6,
        "row": lambda: torch.rand(cols) < 0.6,
        "per batch": lambda: torch.rand(2, 1, 5, cols) < 0.6,
        "keys of a batch": lambda: torch.rand(2, 1, 1, cols) < 0.6,
        "queries": lambda: torch.ones(5, 1, dtype=torch.bool),
        "of a head": lambda: torch.rand(3, 1, cols) < 0.6,
        "one": lambda: torch.ones((), dtype=torch.bool),
        "transposed": lambda: (torch.rand(cols, 5) < 0.6).t(),
        "five dimensions": lambda: torch.rand(1, 3, 1, 5, cols) < 0.6,
    }[name]()
    if name == "five dimensions":
        x = 3 * torch.randn(2, 3, 2, 5, cols)
        mask = torch.stack([mask, mask], -1)[..., 0]
    if mask.shape[-1:] == (cols,):
        mask[..., 0] = True
    return x.to(dtype), mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [37, 64])  # without and with vector loads on a GPU
@pytest.mark.parametrize("name", MASKS)
def test_masks(backend, name, dtype, cols):
    x, mask = masked(name, dtype, cols)
    g = torch.randn(x.shape).to(dtype)
    check(x, g, backend, mask=mask, scale=0.5)
    bias = torch.randn(mask.shape).masked_fill(~mask, float("-inf"))
    check(x, g, backend, mask=bias, scale=0.5)  # float32, whatever x is
    check(x, g, backend, mask=bias.to(dtype), scale=-0.5)


def test_mask_and_causal_on_long_rows(backend):
    for cols in (long_row(backend, n) for n in (20000, 40001, 66000)):
        x, g = inputs((2, 2, cols), torch.bfloat16)
        check(x, g, backend, mask=torch.rand(2, cols) < 0.5, causal=True)
        check(x, g, backend, mask=torch.randn(2, 1, cols))


def test_mask_of_another_dtype(backend):
    x, g = inputs((3, 20), torch.bfloat16)
    for dtype in (torch.float16, torch.float64):
        check(x, g, backend, mask=torch.randn(20).to(dtype))


def test_what_is_hidden_counts_nothing(backend):
    """NaN and infinity behind a boolean mask, or in the future, change nothing."""
    x, g = inputs((4, 8), torch.float32)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 2] = mask[2] = False
    for options in ({"mask": mask}, {"mask": mask, "causal": True}):
        clean = with_gradients(partial(softmax, backend=backend, **options), [x], [g])
        dirty = x.clone()
        dirty[~mask] = float("nan")
        if options.get("causal"):
            dirty[torch.ones(4, 8, dtype=torch.bool).triu(5)] = float("inf")
        for a, b in zip(clean, with_gradients(partial(softmax, backend=backend, **options), [dirty], [g]), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(clean[0][2], torch.zeros(8))  # sees nothing


@pytest.mark.parametrize("length", [40, 40000])
def test_infinities(backend, length):
    cols = long_row(backend, length)
    x, _ = inputs((5, cols), torch.float32)
    clean = softmax(x, backend=backend)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("inf"), float("-inf")
    x[3, 5] = float("-inf")
    y = softmax(x, backend=backend)
    assert y[0].isnan().all()
    assert y[1].isnan().all()  # as torch.softmax
    assert torch.equal(y[2], torch.zeros(cols))
    assert y[3, 5] == 0
    torch.testing.assert_close(y[3].sum(), torch.tensor(1.0))
    assert torch.equal(y[4], clean[4])


def test_large_values(backend):
    x, g = inputs((3, 64), torch.float32)
    check(x * 1e4, g, backend)
    check(x - 1e6, g, backend)
    check(x, g, backend, scale=1e-30)


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
    x = views()[name]
    check(x, x, backend)
    check(x, x, backend, causal=True)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0, 16), (3, 0), (2, 3, 0)])
def test_empty(backend, shape):
    x, g = inputs(shape, torch.float32)
    for options in ({}, {"causal": True}, {"mask": torch.ones(shape[-1], dtype=torch.bool)}):
        y, dx = with_gradients(partial(softmax, backend=backend, **options), [x], [g])
        assert y.shape == dx.shape == shape


def test_inputs_are_not_changed(backend):
    x, g = inputs((5, 33), torch.float32)
    mask = torch.randn(33)
    before = [t.clone() for t in (x, g, mask)]
    with_gradients(partial(softmax, backend=backend, mask=mask), [x], [g])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, g, mask), strict=True))


def test_a_mask_that_learns_takes_pytorch():
    x, mask = torch.randn(3, 5), torch.randn(5, requires_grad=True)
    assert explain(softmax, x, mask=mask).chosen == "torch"
    softmax(x, mask=mask).square().sum().backward()
    assert mask.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="mask needs a gradient"):
        softmax(x, mask=mask, backend="cpu")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 20),
    cols=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "boolean", "additive"]),
    seed=st.integers(0, 99),
)
def test_any_shape_on_the_cpu(batch, rows, cols, dtype, causal, mask, seed):
    x, g = inputs((batch, rows, cols), dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(batch, 1, cols, generator=generator)
    given = {"none": None, "boolean": bias > -1, "additive": bias}[mask]
    check(x, g, "cpu", causal=causal, mask=given)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", [(37, 64), (5, 1000), (3, 8192), (2, 40001), (1, 262144)])
def test_cuda_threads_in_any_order(simt, shape, seed):
    x, g = inputs(shape, torch.bfloat16)
    run = partial(with_gradients, partial(softmax, backend="cuda", causal=True), [x], [g])
    in_order = run()
    simt.set_seed(seed)
    try:
        shuffled = run()
    finally:
        simt.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


BAD = {
    "not a tensor": (lambda x: softmax([1.0]), TypeError, "x must be a torch.Tensor"),
    "integers": (lambda x: softmax(x.int()), TypeError, "x must be float32"),
    "scalar": (lambda x: softmax(x[0, 0]), ValueError, "at least 1 dimension"),
    "causal vector": (lambda x: softmax(x[0], causal=True), ValueError, "at least 2 dimension"),
    "mask's shape": (
        lambda x: softmax(x, mask=x[:, :3]),
        ValueError,
        r"mask \[4, 3\] does not broadcast to x \[4, 16\]",
    ),
    "mask that widens": (lambda x: softmax(x, mask=x.expand(2, 4, 16)), ValueError, "does not broadcast"),
    "mask's dtype": (lambda x: softmax(x, mask=x.int()), TypeError, "mask must be bool or floating"),
    "mask elsewhere": (lambda x: softmax(x, mask=x.to("meta")), ValueError, "mask is on meta"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("preferred", ["torch", "cpu", "triton", "cuda"])
def test_bad_input(simt, case, preferred):
    bad, error, message = BAD[case]
    with use_backend(preferred), pytest.raises(error, match=message):
        bad(torch.randn(4, 16))


def test_double_backward_raises(backend):
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(softmax(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"softmax: its kernels have no second derivative"):
        dx.sum().backward()


def test_opcheck(backend):
    x, g = inputs((2, 3, 16), torch.float32)
    for mask in (None, torch.ones(3, 1, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.fastllm.softmax_forward, (x, mask, 0.5, True, backend))
    torch.library.opcheck(torch.ops.fastllm.softmax_backward, (g, x.softmax(-1), 0.5, True, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    torch._dynamo.reset()

    def layer(x, mask):
        return torch.sin(softmax(x * 2, scale=0.5, causal=True, mask=mask, backend=backend))

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        x, g = inputs((rows, 32), torch.float32)
        mask = torch.randn(32)
        for got, expected in zip(
            with_gradients(partial(compiled, mask=mask), [x], [g]),
            with_gradients(partial(layer, mask=mask), [x], [g]),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend_on_gpu", "dtype", "shape"),
    on_gpus([(1, 1), (7, 3), (4096, 128), (33, 1000), (257, 4096), (9, 65536), (3, 262144), (2, 999983)]),
    ids=str,
)
def test_on_a_gpu(backend_on_gpu, dtype, shape):
    x, g = (t.cuda() for t in inputs(shape, dtype))
    check(x, g, backend_on_gpu)
    check(x, g, backend_on_gpu, causal=True, scale=0.3, mask=torch.rand(shape[-1], device="cuda") < 0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_on_a_gpu(backend_on_gpu, name):
    x, mask = (t.cuda() for t in masked(name, torch.bfloat16))
    check(x, torch.randn_like(x), backend_on_gpu, mask=mask)
    check(x, torch.randn_like(x), backend_on_gpu, mask=torch.randn(mask.shape, device="cuda").masked_fill(~mask, -1e9))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_more_than_2_31_elements_on_a_gpu(backend_on_gpu):
    x = torch.zeros(2**31 // 4096 + 8, 4096, dtype=torch.bfloat16, device="cuda")
    x[0] = x[-1] = torch.randn(4096, device="cuda").bfloat16()
    x.requires_grad_()
    y = softmax(x, backend=backend_on_gpu)
    assert torch.equal(y[0], y[-1])
    y.backward(x.detach())
    assert torch.equal(x.grad[0], x.grad[-1])
