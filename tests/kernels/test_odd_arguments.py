"""Arguments that nobody would write down and that arrive all the same: what they do, or the error that names them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastllm.kernels import (
    cross_entropy,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    linear_log_prob,
    rms_norm,
    rope,
    softmax,
)
from tests.kernels.attention_checks import check_same, plain_dtype
from tests.numerics import with_gradients

TARGET = torch.tensor([0, 1, 3, 3])


@pytest.mark.parametrize("weight", [float("inf"), float("nan")])
def test_the_weight_of_a_class_that_is_no_target_changes_nothing(weight, backend):
    """As 1 / counts gives it."""
    weights, hidden, head = torch.tensor([0.5, 1.0, weight, 0.2]), torch.randn(4, 8), torch.randn(4, 8)
    for reduction in ("mean", "sum", "none"):
        finite, options = weights.clone().index_fill(0, torch.tensor(2), 7.0), {"reduction": reduction}
        grads = [torch.ones(4) if reduction == "none" else torch.ones(())]
        call = partial(cross_entropy, target=TARGET, backend=backend, **options)
        head_call = partial(linear_cross_entropy, target=TARGET, backend=backend, **options)
        for got, expected in (
            (partial(call, weight=weights), partial(call, weight=finite)),
            (
                partial(head_call, weight=head, class_weight=weights),
                partial(head_call, weight=head, class_weight=finite),
            ),
        ):
            for a, b in zip(with_gradients(got, [hidden[:, :4] if got.func is cross_entropy else hidden], grads),
                            with_gradients(expected, [hidden[:, :4] if got.func is cross_entropy else hidden], grads),
                            strict=True):  # fmt: skip
                torch.testing.assert_close(a, b)


def test_what_an_ignored_row_holds_changes_nothing():
    """Of the specification too; the kernels have tests of their own."""
    target = torch.tensor([1, -100, 2])
    for bad in (float("nan"), float("inf"), float("-inf")):
        for options in ({}, {"z_loss": 0.1}, {"softcap": 5.0}, {"label_smoothing": 0.1}):
            x = torch.randn(3, 4)
            x[1] = bad
            x.requires_grad_()
            loss = cross_entropy(x, target, backend="torch", **options)
            loss.backward()
            assert bool(loss.isfinite()) and bool((x.grad[1] == 0).all()) and bool(x.grad.isfinite().all())


def test_the_gradient_never_overwrites_a_parameter(backend):
    for make in (lambda p: p, lambda p: p[:], lambda p: p.view(3, 5)):
        parameter = torch.nn.Parameter(torch.randn(3, 5))
        before = parameter.detach().clone()
        cross_entropy(make(parameter), torch.arange(3), inplace_backward=True, backend=backend).backward()
        assert torch.equal(parameter.detach(), before)
        assert parameter.grad.data_ptr() != parameter.data_ptr()


def test_a_gradient_changed_in_place_is_not_the_next_one(backend):
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(5), backend=backend)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(2)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), kept, strict=True):
        assert torch.equal(a, b)


def test_a_vectorised_jacobian():
    x, weight = torch.randn(5, 8), torch.randn(9, 8)
    jacobian = partial(torch.autograd.functional.jacobian, lambda x: linear_cross_entropy(x, weight, torch.arange(5)))
    torch.testing.assert_close(jacobian(x, vectorize=True), jacobian(x))


@pytest.mark.parametrize("made", ["unbind", "no_grad", "inference", "leaf view"])
def test_rope_in_place_changes_nothing_where_k_may_not_change(made, backend):
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    q = torch.randn(1, 5, 2, 8)
    source = (2 * torch.randn(1, 5, 2, 2, 8, requires_grad=True)) if made != "leaf view" else torch.randn(1, 5, 3, 8)
    if made == "unbind":
        k = source.unbind(2)[0]
    elif made == "no_grad":
        with torch.no_grad():
            k = source[:, :, 0]
    elif made == "inference":
        with torch.inference_mode():
            k = torch.randn(1, 5, 2, 8)
    else:
        k = source[:, :, 1:].requires_grad_()
    before = [t.detach().clone() for t in (q, k)]
    with pytest.raises(RuntimeError, match=r"in-?place|inplace|Inplace"):
        rope(q, k, cos, sin, inplace=True, backend=backend)
    assert all(torch.equal(a.detach(), b) for a, b in zip((q, k), before, strict=True))


def test_rope_in_place_of_what_has_no_memory():
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    meta = [torch.empty(2, 5, n, 8, device="meta") for n in (3, 1)]
    rope(*meta, cos.to("meta"), sin.to("meta"), inplace=True)
    nothing = torch.zeros(2, 0, 4, 8)
    rope(nothing[:, :, :2], nothing[:, :, 1:], cos, sin, inplace=True)
    rope(nothing[:1].expand(2, 0, 4, 8), nothing, cos, sin, inplace=True)


def test_positions_outside_the_tables_raise_in_the_specification():
    q, cos, positions = torch.randn(1, 4, 2, 8), torch.randn(4, 4), torch.tensor([[0, 1, 2, 3]])
    for wrong in (-1, 4):
        positions[0, 2] = wrong
        with pytest.raises(IndexError, match=f"positions holds {wrong}, cos and sin hold 4"):
            rope(q, q, cos, cos, positions=positions, backend="torch")
        compiled = torch.compile(partial(rope, backend="torch"), backend="eager", fullgraph=True)
        turned = compiled(q, q, cos, cos, positions=positions)[0]  # cannot raise, and must not be another row
        assert turned[:, 2].isnan().all() and turned[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rope_under_an_autocast_of_another_dtype(dtype):
    q, cos, other = torch.randn(1, 5, 2, 8).to(dtype), torch.randn(5, 2), {torch.float16, torch.bfloat16} - {dtype}
    expected = rope(q, q, cos, cos, backend="torch")[0]
    with torch.autocast("cpu", other.pop()):
        assert torch.equal(rope(q, q, cos, cos, backend="torch")[0], expected)


@pytest.mark.parametrize("scale", [-1.0, 0.0, -0.3])
def test_scales_that_are_not_positive(scale, any_backend):
    def eager(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        p = scores.masked_fill(torch.ones(9, 9).tril() == 0, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", p, v)

    tensors = torch.randn(3, 1, 9, 2, 8, dtype=plain_dtype(any_backend))
    check_same(partial(flash_attention, scale=scale, backend=any_backend), eager, *tensors)


def test_the_torch_backend_of_attention_compiles():
    call = partial(flash_attention, backend="torch")
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="eager")
        for seq_q, seq_k in ((5, 5), (7, 7), (2, 9), (3, 11), (1, 6)):
            q, k = torch.randn(1, seq_q, 2, 8).double(), torch.randn(1, seq_k, 2, 8).double()
            torch.testing.assert_close(compiled(q, k, k), call(q, k, k))
    seq = torch.export.Dim("seq", min=3, max=99)

    class Attend(torch.nn.Module):
        def forward(self, q, k):
            return flash_attention(q[:, -2:], k, k)

    q = torch.randn(1, 9, 2, 8).double()
    program = torch.export.export(Attend(), (q, q), dynamic_shapes=({1: seq}, {1: seq})).module()
    for n in (3, 20):
        q = torch.randn(1, n, 2, 8).double()
        torch.testing.assert_close(program(q, q), flash_attention(q[:, -2:], q, q))


def test_what_lies_behind_a_row_is_not_multiplied():
    """Rows with a stride and odd features, cut out of memory that holds NaN."""
    memory = torch.full((34, 16), float("nan"), dtype=torch.bfloat16)
    hidden, weight = memory[:, :13], torch.full((100, 16), float("nan"), dtype=torch.bfloat16)[:, :13]
    hidden.copy_(torch.randn(34, 13))
    weight.copy_(torch.randn(100, 13))
    target = torch.arange(34)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, target)
    expected = F.cross_entropy(hidden.float() @ weight.float().t(), target)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, leaves))


def test_integers_of_any_kind_as_a_window():
    q = torch.randn(1, 9, 2, 8)
    for kind in (np.int64, np.int32, torch.tensor):
        assert torch.equal(flash_attention(q, q, q, window=kind(3)), flash_attention(q, q, q, window=3))
        pair = flash_attention(q, q, q, causal=False, window=(kind(3), kind(1)))
        assert torch.equal(pair, flash_attention(q, q, q, causal=False, window=(3, 1)))


X, W, Q = torch.randn(4, 8), torch.randn(4, 8), torch.randn(1, 4, 2, 8)
CU = torch.tensor([0, 4])
LEARNT = torch.tensor(0.5, requires_grad=True)
NESTED = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
REFUSED = [
    (lambda: flash_attention(Q, Q, Q, window=3.0), TypeError, "flash_attention: window must be an integer, not 3.0"),
    (lambda: flash_attention(Q, Q, Q, window=(2.5, None)), TypeError, "window must be an integer, not 2.5"),
    (lambda: flash_decode(Q, Q, Q, window="ab"), TypeError, "flash_decode: window must be an integer, not 'ab'"),
    (lambda: flash_attention(Q, Q, Q, softcap=-2.0), ValueError, "softcap must be positive, or 0 for none, not -2.0"),
    (lambda: flash_decode(Q, Q, Q, softcap=-2.0), ValueError, "flash_decode: softcap must be positive"),
    (lambda: cross_entropy(X, TARGET, softcap=-1), ValueError, "cross_entropy: softcap must be positive"),
    (lambda: linear_cross_entropy(X, W, TARGET, softcap=float("nan")), ValueError, "softcap must be positive"),
    (lambda: linear_log_prob(X, W, TARGET, softcap=-1), ValueError, "linear_log_prob: softcap must be positive"),
    (lambda: flash_attention(Q, Q, Q, scale=LEARNT), TypeError, r"scale gets no gradient; pass scale.item\(\)"),
    (lambda: softmax(X, scale=LEARNT), TypeError, "softmax: scale gets no gradient"),
    (lambda: rms_norm(X, weight_offset=LEARNT), TypeError, "rms_norm: weight_offset gets no gradient"),
    (lambda: rms_norm(X, eps=None), TypeError, "rms_norm: eps must be a number, not None"),
    (lambda: cross_entropy(X, TARGET, z_loss=LEARNT), TypeError, "cross_entropy: z_loss gets no gradient"),
    (lambda: cross_entropy(X, TARGET, label_smoothing="a"), TypeError, "label_smoothing must be a number, not 'a'"),
    (lambda: cross_entropy(X, TARGET, ignore_index=None), TypeError, "ignore_index must be an integer, not None"),
    (lambda: cross_entropy(X, TARGET, ignore_index=2**70), ValueError, "ignore_index must fit in 64 bits"),
    (
        lambda: cross_entropy(X, TARGET.float()),
        TypeError,
        "target must be int64 or int32, not float32, or hold the prob",
    ),
    (lambda: cross_entropy(X, TARGET + 8, z_loss=0.1, backend="torch"), IndexError, "cross_entropy: target holds 8"),
    (lambda: linear_log_prob(X, W, TARGET + 4, backend="torch"), IndexError, "linear_log_prob: target holds 4"),
    (
        lambda: flash_attention(Q[0], Q[0], Q[0], cu_seqlens_q=CU, max_seqlen_q=-3),
        ValueError,
        "max_seqlen_q must be at",
    ),
    (
        lambda: flash_attention(Q[0], Q[0], Q[0], cu_seqlens_q=CU, max_seqlen_q="x"),
        TypeError,
        "max_seqlen_q must be an",
    ),
    (lambda: rms_norm(NESTED), TypeError, "rms_norm: x is a nested tensor"),
    (lambda: softmax(NESTED), TypeError, "softmax: x is a nested tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
