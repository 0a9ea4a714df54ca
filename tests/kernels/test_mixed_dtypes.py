"""Arguments of several dtypes, under autocast and without: as PyTorch takes them, or an error with its mend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import (
    cross_entropy,
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
from tests.numerics import assert_accurate

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("narrow", [BF16, HALF], ids=str)
@pytest.mark.parametrize("cols", [7, 64, 20000])
def test_a_float32_residual_stays_float32(narrow, cols, backend):
    """The residual stream of a model under autocast: what layers add to it is rounded nowhere."""
    cols = min(cols, 9000) if backend == "triton" else cols
    backend = None if backend == "cuda" else backend  # its kernel takes one dtype: another backend runs
    x, residual, weight = torch.randn(3, cols).to(narrow), torch.randn(3, cols), torch.randn(cols)
    dy, dh = torch.randn(3, cols).to(narrow), torch.randn(3, cols)

    def call(cast, chosen):
        leaves = [cast(t).requires_grad_() for t in (x.clone(), residual.clone(), weight.clone())]
        y, h = rms_norm(leaves[0], leaves[2], residual=leaves[1], backend=chosen)
        return [y, h, *torch.autograd.grad([y, h], leaves, [cast(dy), cast(dh)])]

    exact, eager, actual = call(Tensor.double, "torch"), call(lambda t: t, "torch"), call(lambda t: t, backend)
    assert [t.dtype for t in actual] == [narrow, FLOAT, narrow, FLOAT, FLOAT]
    assert torch.equal(actual[1], x.float() + residual)
    for name, a, b, c in zip(("y", "h", "dx", "dresidual", "dweight"), actual, eager, exact, strict=True):
        assert_accurate(a.detach(), b.detach(), c.detach(), name, c.detach().abs() + 1)


def test_the_other_way_round_the_residual_is_widened(backend):
    x, residual = torch.randn(3, 16), torch.randn(3, 16).bfloat16().requires_grad_()
    y, h = rms_norm(x, residual=residual, backend=backend)
    expected, sums = rms_norm(x, residual=residual.detach().float(), backend=backend)
    assert torch.equal(y, expected) and torch.equal(h, sums)
    assert gradients(y, residual)[0].dtype == BF16


def test_weights_and_tables_of_any_dtype(backend):
    x, weight = torch.randn(3, 16), torch.randn(16).bfloat16().requires_grad_()
    y = rms_norm(x, weight, backend=backend)
    assert torch.equal(y, rms_norm(x, weight.detach().float(), backend=backend))
    assert gradients(y, weight)[0].dtype == BF16
    q, k, angles = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8).bfloat16(), torch.randn(5, 4).bfloat16()
    turned = rope(q, k, angles.cos(), angles.sin(), backend=backend)
    assert [t.dtype for t in turned] == [FLOAT, BF16]
    for x, got in zip((q, k), turned, strict=True):
        alone = rope(x, x, angles.cos().float(), angles.sin().float(), backend=backend)[0]
        assert torch.equal(got, alone)


@pytest.mark.parametrize("dtypes", [(BF16, FLOAT), (FLOAT, HALF), (BF16, HALF)], ids=str)
def test_swiglu_promotes(dtypes, backend):
    gate, up = (torch.randn(3, 16).to(d).requires_grad_() for d in dtypes)
    out = swiglu(gate, up, backend=backend)
    assert out.dtype == torch.promote_types(*dtypes) == FLOAT
    torch.testing.assert_close(out, F.silu(gate.float()) * up.float())
    assert [g.dtype for g in gradients(out, gate, up)] == list(dtypes)


def test_attention_under_autocast_is_cast_as_sdpa():
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    for dtypes in ((FLOAT, FLOAT, FLOAT), (FLOAT, FLOAT, BF16), (HALF, BF16, FLOAT)):
        given = [t.detach().to(d).requires_grad_() for t, d in zip((q, k, v), dtypes, strict=True)]
        with torch.autocast("cpu", BF16):
            out = flash_attention(*given)
            theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in given), is_causal=True)
            with torch.no_grad():
                decoded = flash_decode(*given)
        assert out.dtype == theirs.dtype == decoded.dtype == BF16
        torch.testing.assert_close(out, theirs.transpose(1, 2), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(decoded, out, rtol=2e-2, atol=2e-2)
        assert [g.dtype for g in gradients(out, *given)] == list(dtypes)
    with torch.autocast("cpu", BF16):  # float64 is not narrowed
        assert flash_attention(*(t.double() for t in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("hidden_dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("weight_dtype", [FLOAT, BF16, HALF], ids=str)
def test_heads_under_autocast_are_cast_as_linear(hidden_dtype, weight_dtype):
    hidden, target = torch.randn(6, 16).to(hidden_dtype).requires_grad_(), torch.arange(6)
    weight, bias = (torch.randn(s).to(weight_dtype).requires_grad_() for s in ((10, 16), (10,)))
    with torch.autocast("cpu", BF16):
        theirs = F.cross_entropy(F.linear(hidden, weight, bias).float(), target)
        loss = linear_cross_entropy(hidden, weight, target, bias=bias)
        log_prob = linear_log_prob(hidden, weight, target, bias=bias)
    assert loss.dtype == log_prob.dtype == FLOAT
    torch.testing.assert_close(loss, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(-log_prob.mean(), theirs, rtol=1e-2, atol=1e-2)
    got, expected = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (loss, theirs))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_an_ordinary_block_under_autocast(backend):
    """float32 parameters and residual stream, bfloat16 products: each op takes what the one before it gives."""
    attention, backend = backend, None if backend == "cuda" else backend  # which has no kernel for some of them
    stream = torch.randn(2, 6, 16, requires_grad=True)
    norm, qkv, gate, head = (torch.randn(s, requires_grad=True) for s in ((16,), (16, 48), (16, 32), (9, 16)))
    angles = torch.randn(6, 4)
    with torch.autocast("cpu", BF16):
        y, h = rms_norm(stream * 1, norm, residual=stream, backend=backend)
        q, k, v = (y @ qkv).unflatten(-1, (3, 2, 8)).unbind(2)
        q, k = rope(q, k, angles.cos(), angles.sin(), backend=backend)
        x = flash_attention(q, k, v, backend=attention).flatten(-2)
        assert x.dtype == BF16 and h.dtype == FLOAT
        y, h = rms_norm(x, norm, residual=h, backend=backend if backend != "cpu" else None)
        x = swiglu(*(y @ gate).chunk(2, -1), backend=backend)
        assert x.dtype == BF16 and h.dtype == FLOAT
        y, h = rms_norm(x, norm, residual=h, backend=backend if backend != "cpu" else None)
        loss = linear_cross_entropy(y, head, torch.zeros(2, 6, dtype=torch.long), backend=backend)
        loss = loss + cross_entropy(softmax(y, backend=backend), torch.zeros(2, 6, dtype=torch.long), backend=backend)
    assert all(
        g.dtype == FLOAT and g.isfinite().all() for g in torch.autograd.grad(loss, (stream, norm, qkv, gate, head))
    )


def test_what_stays_refused_says_how_to_mend_it():
    x, q = torch.randn(2, 8), torch.randn(1, 4, 2, 8)
    for call, message in [
        (lambda: flash_attention(q, q, q.bfloat16()), r"v is bfloat16 but k is float32; cast one"),
        (
            lambda: linear_cross_entropy(x, x.bfloat16(), torch.zeros(2).long()),
            "under torch.autocast, which casts both",
        ),
        (
            lambda: linear_log_prob(x.bfloat16(), x.half(), torch.zeros(2).long()),
            "weight is float16 but hidden is bfloat16",
        ),
        (lambda: rms_norm(x, x[0].double()), r"weight is float64 but x is float32; call weight.float\(\)"),
        (lambda: rms_norm(x, residual=x.double()), "residual is float64 but x is float32"),
        (lambda: rms_norm(x, x[0].int()), "weight must be float32, float16 or bfloat16, not int32"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_meta_tensors_have_no_autocast():
    hidden, weight = torch.empty(4, 8, device="meta"), torch.empty(9, 8, device="meta")
    target = torch.zeros(4, dtype=torch.long, device="meta")
    heads = torch.empty(1, 4, 2, 8, device="meta")
    for on in (False, True):
        with torch.autocast("cpu", BF16, enabled=on):
            assert linear_cross_entropy(hidden, weight, target).shape == ()
            assert linear_log_prob(hidden, weight, target).shape == (4,)
            assert linear_jsd(hidden, weight, hidden, weight, mask=target > 0).shape == ()
            assert flash_attention(heads, heads, heads).shape == heads.shape
