"""The specifications (the torch backend), against PyTorch's own functions and by gradcheck."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastllm.kernels import (
    CausalSelfAttention,
    SwiGLU,
    cross_entropy,
    flash_attention,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
    rope,
    softmax,
    swiglu,
)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ---- attention ----


def qkv(seq_q=5, seq_k=5, heads=4, kv_heads=2, dim=8, batch=2):
    return double(batch, seq_q, heads, dim), double(batch, seq_k, kv_heads, dim), double(batch, seq_k, kv_heads, dim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(5, 5), (1, 7), (3, 7), (7, 3)])
def test_attention_is_sdpa(causal, seq_q, seq_k):
    q, k, v = qkv(seq_q, seq_k)
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool).tril(seq_k - seq_q) if causal else None
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True)
    expected = expected.transpose(1, 2).nan_to_num(0.0)
    spec, lse = flash_attention(q, k, v, causal=causal, return_lse=True)  # explicit scores
    torch.testing.assert_close(spec, expected)
    torch.testing.assert_close(flash_attention(q, k, v, causal=causal), expected)  # through PyTorch's SDPA
    assert lse.shape == (2, 4, seq_q)


def test_attention_gradients():
    q, k, v = qkv(4, 6)
    sinks = double(4)
    run = partial(flash_attention, causal=True, return_lse=True)
    assert gradcheck(run, (q, k, v))
    assert gradcheck(lambda q, k, v, s: run(q, k, v, sinks=s, window=3, softcap=2.0), (q, k, v, sinks))
    q, k, v = qkv(6, 3)  # rows that see nothing
    assert gradcheck(lambda q, k, v: flash_attention(q, k, v), (q, k, v))


def test_attention_window_softcap_sinks():
    q, k, v = (t.detach() for t in qkv(6, 6, heads=2, kv_heads=2, batch=1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    scores = 1.5 * torch.tanh(scores / 1.5)
    at = torch.arange(6)
    behind = at[:, None] - at
    scores = scores.masked_fill((behind < 0) | (behind >= 3), float("-inf"))
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    probs = torch.cat([scores, sinks.view(1, 2, 1, 1).expand(1, 2, 6, 1)], -1).softmax(-1)[..., :-1]
    got = flash_attention(q, k, v, window=3, softcap=1.5, sinks=sinks)
    torch.testing.assert_close(got, torch.einsum("bhqk,bkhd->bqhd", probs, v))


def test_packed_documents_do_not_see_each_other():
    lengths_q, lengths_k = [3, 1, 4], [3, 5, 2]
    pieces = [qkv(a, b, batch=1) for a, b in zip(lengths_q, lengths_k, strict=True)]
    packed = [torch.cat([p[i][0] for p in pieces]) for i in range(3)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    got, lse = flash_attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    torch.testing.assert_close(got, torch.cat([flash_attention(*p)[0] for p in pieces]))
    assert lse.shape == (4, 8)


def test_attention_refuses():
    q, k, v = (t.detach().float() for t in qkv())
    with pytest.raises(ValueError, match=r"heads of q \(4\) must be a multiple of those of k and v \(3\)"):
        flash_attention(q, k.repeat(1, 1, 2, 1)[:, :, :3], v.repeat(1, 1, 2, 1)[:, :, :3])
    with pytest.raises(ValueError, match="v must have shape"):
        flash_attention(q, k, v[:, :-1])
    with pytest.raises(TypeError, match="k is float64 but q is float32"):
        flash_attention(q, k.double(), v)
    with pytest.raises(ValueError, match="window"):
        flash_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"q must be \[tokens, heads, head_dim\]"):
        flash_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 5]))


# ---- softmax and the losses ----


def test_softmax():
    x = double(2, 3, 4, 6)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    future = torch.ones(4, 6, dtype=torch.bool).triu(3)
    torch.testing.assert_close(
        softmax(x, scale=0.5, causal=True), (x * 0.5).masked_fill(future, float("-inf")).softmax(-1)
    )
    mask = torch.rand(3, 1, 6) > 0.4
    mask[..., 0] = True
    torch.testing.assert_close(softmax(x, mask=mask), x.masked_fill(~mask, float("-inf")).softmax(-1))
    torch.testing.assert_close(softmax(x, mask=mask.double()), (x + mask.double()).softmax(-1))
    nothing = torch.zeros(6, dtype=torch.bool)
    assert torch.equal(softmax(x, mask=nothing), torch.zeros_like(x))
    assert gradcheck(lambda x: softmax(x, causal=True, scale=2.0), (double(2, 5, 3),))
    with pytest.raises(ValueError, match="does not broadcast"):
        softmax(x, mask=mask[..., :2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(reduction, smoothing, weighted):
    logits, target = double(9, 5), torch.randint(5, (9,))
    target[3] = target[7] = -100
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    got = cross_entropy(logits, target, **options)
    expected = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, expected)))


def test_cross_entropy_more():
    logits, target = double(4, 7), torch.tensor([1, 6, -100, 0])
    assert gradcheck(lambda x: cross_entropy(x, target, z_loss=0.1, softcap=3.0, return_lse=True), (logits,))
    loss, lse = cross_entropy(logits, target, z_loss=0.1, softcap=3.0, return_lse=True, reduction="none")
    capped = 3 * torch.tanh(logits / 3)
    torch.testing.assert_close(lse, capped.logsumexp(-1))
    expected = F.cross_entropy(capped, target, reduction="none") + 0.1 * lse.square() * (target != -100)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_is_not_weighed(reduction):
    """A mean divides the weighted losses by their weights and the z-loss by the number of valid targets."""
    logits, target, weight = double(6, 9), torch.tensor([1, 2, -100, 0, 8, 8]), torch.rand(9).double()
    valid = target != -100
    squares = 0.1 * logits.logsumexp(-1).square() * valid
    z = {"mean": squares.sum() / valid.sum(), "sum": squares.sum(), "none": squares}[reduction]
    expected = F.cross_entropy(logits, target, weight, reduction=reduction) + z
    got = cross_entropy(logits, target, weight=weight, z_loss=0.1, reduction=reduction)
    torch.testing.assert_close(got, expected)
    scaled = cross_entropy(logits, target, weight=5 * weight, z_loss=0.1, reduction="mean")
    torch.testing.assert_close(scaled, cross_entropy(logits, target, weight=weight, z_loss=0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_targets_are_torchs(reduction, smoothing, weighted):
    logits, target, weight = double(6, 9), torch.rand(6, 9).double(), torch.rand(9).double() if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(logits, target, weight, **options)
    torch.testing.assert_close(cross_entropy(logits, target, weight=weight, **options), expected)
    eye = torch.eye(9).double()
    torch.testing.assert_close(linear_cross_entropy(logits, eye, target, class_weight=weight, **options), expected)
    loss, lse = cross_entropy(logits, target, z_loss=0.1, return_lse=True, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none") + 0.1 * lse.square())
    with pytest.raises(ValueError, match=r"target must have shape \[6, 9\]"):
        cross_entropy(logits, target[:, :8])
    with pytest.raises(ValueError, match="target holds probabilities"):
        cross_entropy(logits.float(), target.float(), backend="cpu")


def test_nothing_valid_gives_zero_with_zero_gradients():
    logits = torch.full((3, 5), float("inf"), requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100))
    assert loss == 0
    logits = torch.randn(3, 5, requires_grad=True)
    cross_entropy(logits, torch.full((3,), -100)).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 5))


def test_linear_losses():
    hidden, weight, bias, target = double(2, 4, 6), double(9, 6), double(9), torch.randint(9, (2, 4))
    logits = F.linear(hidden, weight, bias)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, bias=bias), cross_entropy(logits, target))
    log_prob = linear_log_prob(hidden, weight, target, bias=bias)
    torch.testing.assert_close(
        log_prob, -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(2, 4)
    )
    options = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1, "return_lse": True}
    assert gradcheck(lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, **options), (hidden, weight, bias))
    options = {"softcap": 3.0, "temperature": 0.7, "return_entropy": True}
    assert gradcheck(lambda h, w, b: linear_log_prob(h, w, target, bias=b, **options), (hidden, weight, bias))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_jsd(beta):
    (hidden, weight, bias), (other, other_weight) = (
        (double(2, 4, 6), double(9, 6), double(9)),
        (double(2, 4, 3), double(9, 3)),
    )
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    run = partial(linear_jsd, beta=beta, temperature=1.5)
    p, q = ((F.linear(*x) / 1.5).softmax(-1)[mask] for x in ((other, other_weight), (hidden, weight, bias)))
    m = beta * p + (1 - beta) * q
    kls = [(a * (a / b).log()).sum(-1) for a, b in ((p, q), (q, p), (p, m), (q, m))]
    right = {0.0: kls[0], 1.0: kls[1]}.get(beta, beta * kls[2] + (1 - beta) * kls[3])
    options = {"bias": bias, "mask": mask}
    each = run(hidden, weight, other, other_weight, reduction="none", **options)
    torch.testing.assert_close(each[mask], right)
    assert not each[~mask].any()
    for reduction, expected in (("sum", right.sum()), ("mean", right.mean())):
        torch.testing.assert_close(run(hidden, weight, other, other_weight, reduction=reduction, **options), expected)
    assert gradcheck(lambda h, w, b: run(h, w, other.detach(), other_weight, bias=b, mask=mask), (hidden, weight, bias))
    assert torch.autograd.grad(each.sum(), (other, other_weight), allow_unused=True) == (None, None)


# ---- rope and swiglu ----


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_each_pair(interleaved):
    q, k = double(2, 5, 3, 8), double(2, 5, 1, 8)
    angle = torch.randn(5, 4, dtype=torch.float64)
    turned, _ = rope(q, k, angle.cos(), angle.sin(), interleaved=interleaved)
    pairs = (
        (lambda x: torch.complex(x[..., 0::2], x[..., 1::2]))
        if interleaved
        else (lambda x: torch.complex(*x.chunk(2, -1)))
    )
    torch.testing.assert_close(pairs(turned), pairs(q) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1))
    assert gradcheck(lambda q, k: rope(q, k, angle.cos(), angle.sin(), interleaved=interleaved), (q, k))


def test_rope_positions_and_partial_rotation():
    q, k = double(2, 3, 2, 8), double(2, 3, 1, 8)
    angle = torch.randn(9, 2, dtype=torch.float64)
    positions = torch.tensor([[4, 5, 6], [0, 1, 0]])
    got, _ = rope(q, k, angle.cos(), angle.sin(), positions=positions)
    assert torch.equal(got[..., 4:], q[..., 4:])
    first, _ = rope(q[:1], k[:1], angle.cos()[4:], angle.sin()[4:])
    torch.testing.assert_close(got[:1], first)
    with pytest.raises(ValueError, match="cos and sin hold 2 positions, q has 3"):
        rope(q, k, angle.cos()[:2], angle.sin()[:2])


def test_swiglu():
    gate, up = double(3, 5), double(3, 5)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert gradcheck(swiglu, (gate, up))
    with pytest.raises(ValueError, match="up must have shape"):
        swiglu(gate, up[:1])


def test_modules():
    mlp, x = SwiGLU(8, 12), torch.randn(2, 5, 8)
    torch.testing.assert_close(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    attention = CausalSelfAttention(8, heads=4, kv_heads=2, qk_norm=True)
    angle = torch.randn(5, 1)
    assert attention(x, angle.cos(), angle.sin()).shape == x.shape
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        CausalSelfAttention(8, heads=4, kv_heads=3)
