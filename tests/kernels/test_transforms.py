"""torch.func, forward-mode differentiation, second derivatives and one tensor as two arguments: right, or refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fastllm.kernels import (
    cross_entropy,
    explain,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from tests.kernels.attention_checks import plain_dtype

SEQ, DIM = 5, 8


def constant(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float64).cos().view(shape)


def attend(x: Tensor, rows: int = SEQ, **options) -> Tensor:
    heads = x.view(1, SEQ, 2, DIM // 2)
    return flash_attention(heads[:, SEQ - rows :], heads[:, :, :1], heads.sin()[:, :, 1:], **options).square().sum()


def turn(x: Tensor, **options) -> Tensor:
    heads, angles = x.view(1, SEQ, 2, DIM // 2), constant(SEQ, DIM // 4).to(x.dtype)
    return rope(heads * 1, heads * 2, angles.cos(), angles.sin(), **options)[1].pow(3).sum()


def linear(op, x: Tensor, **options) -> Tensor:
    return op(x, constant(9, DIM).to(x.dtype), torch.arange(SEQ), **options).square().sum()


def distil(x: Tensor, **options) -> Tensor:
    weight = constant(9, DIM).to(x.dtype)
    return 100 * linear_jsd(x, weight, weight[:SEQ] * 3, weight, **options).square().sum()


FUNCTIONS = {
    "rms_norm": lambda x, **o: rms_norm(x, x[0], residual=x.cos(), **o)[0].square().sum(),
    "softmax": lambda x, **o: softmax(x, causal=True, **o).square().sum(),
    "swiglu": lambda x, **o: swiglu(x, x.sin(), **o).square().sum(),
    "rope": turn,
    "rope in place": partial(turn, inplace=True),
    "flash_attention": attend,
    "flash_attention of few queries": partial(attend, rows=2),
    "cross_entropy": lambda x, **o: cross_entropy(x, torch.arange(SEQ), **o),
    "cross_entropy in place": lambda x, **o: cross_entropy(x * 1, torch.arange(SEQ), inplace_backward=True, **o),
    "linear_cross_entropy": partial(linear, linear_cross_entropy),
    "linear_log_prob": partial(linear, linear_log_prob),
    "entropy": lambda x, **o: linear(lambda *a, **o: linear_log_prob(*a, return_entropy=True, **o)[1], x, **o),
    "linear_jsd": lambda x, **o: distil(x, reduction="mean", **o),
    "linear_jsd of each token": lambda x, **o: distil(x, reduction="none", **o),
}
TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.sin(),))[1],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "hessian": hessian,
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_torch_func_is_right(function, transform):
    """Kernels or PyTorch, whichever can; never a derivative of 0."""
    f, transform, x = FUNCTIONS[function], TRANSFORMS[transform], constant(SEQ, DIM)
    expected = transform(partial(f, backend="torch"))(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(transform(f)(x.float()).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_torch_func_compiles(function, transform):
    torch._dynamo.reset()
    f, x = TRANSFORMS[transform](FUNCTIONS[function]), constant(SEQ, DIM).float()
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(x), f(x), rtol=1e-4, atol=1e-5)


def test_a_transform_that_no_kernel_knows_goes_to_pytorch_or_raises():
    x = torch.randn(3, 4)

    def refused(x: Tensor) -> Tensor:
        assert explain(rms_norm, x).chosen == "torch"
        return rms_norm(x, backend="cpu")

    for transform in (jacfwd(refused), vmap(refused), grad(lambda x: grad(lambda x: refused(x).sum())(x).sum())):
        with pytest.raises(ValueError, match="rms_norm: backend 'cpu' can't run this call: its kernels"):
            transform(x)
    assert explain(rms_norm, x).chosen != "torch" or explain(rms_norm, x).reasons["cpu"].startswith("no: the native")


def test_forward_mode_outside_torch_func():
    q, k, v = (torch.randn(1, n, 2, 8) for n in (2, 6, 6))
    exact = jvp(lambda q: flash_attention(q, k.double(), v.double()), (q.double(),), (torch.ones_like(q).double(),))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        for op in (flash_attention, flash_decode):
            tangent = forward_ad.unpack_dual(op(dual, k, v)).tangent
            torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_retained_graph_is_differentiated_again(backend):
    for name in FUNCTIONS:
        if "in place" in name:
            continue
        dtype = plain_dtype(backend) if "attention" in name else torch.float32
        x = constant(SEQ, DIM).to(dtype).requires_grad_()
        loss = FUNCTIONS[name](x, backend=backend)
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(x.grad, 3 * once, rtol=1e-6, atol=1e-6)


def test_one_tensor_as_two_arguments_compiles():
    x, q = (torch.randn(s, requires_grad=True) for s in ((3, 8), (1, 20, 2, 8)))
    angles = torch.randn(20, 4)
    for f in (
        lambda: rms_norm(x, x[0], residual=x)[0],
        lambda: swiglu(x, x),
        lambda: flash_attention(q, q, q),
        lambda: flash_attention(q, q[:, :, :1], q[:, :, :1]),
        lambda: rope(q, q, angles, angles)[0],
        lambda: linear_cross_entropy(x, x, torch.arange(3)),
        lambda: flash_attention(q[0], q[0], q[0], cu_seqlens_q=torch.tensor([0, 5, 20])),
    ):
        torch._dynamo.reset()
        expected, got = (torch.autograd.grad(g().sum(), (x, q), allow_unused=True) for g in (
            f, torch.compile(f, fullgraph=True, backend="aot_eager")
        ))  # fmt: skip
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b)


def test_second_derivatives_follow_the_message():
    """What the error of a second derivative proposes works."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for function in ("rms_norm", "flash_attention", "linear_cross_entropy"):
        x = constant(SEQ, DIM).float().requires_grad_()
        if explain(rms_norm, x).chosen != "torch":
            (first,) = torch.autograd.grad(FUNCTIONS[function](x), x, create_graph=True)
            with pytest.raises(NotImplementedError, match="backend='torch'"):
                first.sum().backward()
        with sdpa_kernel(SDPBackend.MATH):
            (first,) = torch.autograd.grad(FUNCTIONS[function](x, backend="torch"), x, create_graph=True)
        first.sum().backward()
        assert x.grad.abs().max() > 1e-3
