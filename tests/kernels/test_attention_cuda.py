"""Attention in CUDA C++, in the emulator: what its own tiles, copies and splits could get wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastllm.kernels import explain, flash_attention, flash_decode, native
from fastllm.kernels.attention import native as launchers
from fastllm.kernels.attention import operators
from fastllm.kernels.attention.options import UNBOUNDED, Options
from fastllm.kernels.attention.packing import Packing
from tests.kernels.attention_checks import NARROW, check, check_decode, gradients_in_place, qkv
from tests.numerics import with_gradients

pytestmark = pytest.mark.usefixtures("simt")
HALF, BF16 = NARROW
attend = partial(flash_attention, backend="cuda")
decode = partial(flash_decode, backend="cuda")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 40, 59, 64, 75, 96, 111, 128, 192, 256])
def test_accuracy(dim, dtype):
    """Every dim of the kernels and some that are padded; the last queries stand at the last keys."""
    for causal, lengths, heads in ((True, (70, 150), (6, 2)), (False, (150, 70), (2, 1)), (True, (150, 70), (2, 2))):
        check(qkv(*lengths, *heads, dim, dtype, batch=1), "cuda", causal=causal)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale):
    for options in ({}, {"softcap": 2.0}, {"window": (20, 9), "causal": False}):
        check(qkv(70, 150, 2, 1, 64, BF16, batch=1), "cuda", scale=scale, **options)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_threads_in_any_order(simt, dim, seed):
    """Forward, both backward passes and decoding; queries that see nothing, and keys that none sees."""
    q, k, v = qkv(200, 90, 2, 1, dim, BF16, batch=1)
    long = qkv(3, 300, 2, 1, dim, BF16, batch=1)
    g = torch.randn_like(q)

    def results() -> list[torch.Tensor]:
        found = with_gradients(attend, [q, k, v], [g])
        found += with_gradients(
            partial(attend, window=(40, 9), causal=False), [k.repeat(1, 1, 2, 1), q, q], [k.repeat(1, 1, 2, 1)]
        )
        return [
            *found,
            *decode(*long, return_lse=True),
            *decode(*(t.repeat(9, 1, 1, 1) for t in long), return_lse=True),
        ]

    in_order = results()
    simt.set_seed(seed)
    try:
        shuffled = results()
    finally:
        simt.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


def forms() -> dict[str, list[torch.Tensor]]:
    """q, k and v as they lie in memory."""
    randn = partial(torch.randn, dtype=HALF)
    fused, odd = randn(2, 45, 4 + 2 + 2, 16), randn(2, 45, 4 + 2 + 2, 75)
    return {
        "one projection": list(fused.split((4, 2, 2), 2)),
        "one projection, head_dim 75": list(odd.split((4, 2, 2), 2)),
        "heads first": [randn(2, heads, 45, 16).transpose(1, 2) for heads in (4, 2, 2)],
        "expanded heads": [randn(2, 45, 1, 16).expand(2, 45, heads, 16) for heads in (4, 2, 2)],
        "an odd offset": [randn(2 * 45 * heads * 16 + 3)[3:].view(2, 45, heads, 16) for heads in (4, 2, 2)],
        "rows an odd number apart": [randn(2, 45, heads, 17)[..., :16] for heads in (4, 2, 2)],
        "every second element": [randn(2, 45, heads, 32)[..., ::2] for heads in (4, 2, 2)],
    }


@pytest.mark.parametrize("form", forms())
def test_strides_change_nothing(form):
    tensors = forms()[form]
    g = torch.randn(2, tensors[0].shape[-1], 45, 4, dtype=HALF).permute(0, 2, 3, 1)
    expected = with_gradients(attend, [t.contiguous() for t in tensors], [g.contiguous()])
    for a, b in zip(gradients_in_place(attend, tensors, g), expected, strict=True):
        assert torch.equal(a, b)
    few = [tensors[0][:, -2:], *tensors[1:]]
    assert torch.equal(decode(*few), decode(*(t.contiguous() for t in few)))
    in_place = launchers._in_units("cuda", *operators.in_rows(*tensors))
    read_in_place = form in ("one projection", "heads first", "expanded heads")
    assert all((a is b) == read_in_place for a, b in zip(in_place, tensors, strict=True))


@pytest.mark.parametrize("most", [0, 1, 64, 170])
def test_no_max_seqlen_is_too_small(most):
    """On a GPU nobody looks at the lengths."""
    q, k, v = (t[0] for t in qkv(200, 200, 2, 1, 16, HALF, batch=1))
    cu, options, results = torch.tensor([0, 30, 200]), Options(0.25, UNBOUNDED, 0, 0.0), []
    for longest in (170, most):
        packing = Packing(cu, cu, longest, longest)
        out, lse, delta = (
            torch.full(s, torch.nan, dtype=d)
            for s, d in ((q.shape, HALF), ((2, 200), torch.float32), ((2, 200), torch.float32))
        )
        launchers.attention_forward(q, k, v, None, packing, options, "cuda", out, lse)
        grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
        given = (torch.ones_like(q), None, q, k, v, out, lse, packing, options, False, "cuda")
        launchers.attention_backward(*given, *grads, delta)
        results.append([out, lse, delta, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_no_documents():
    q, k, v = (t[0].requires_grad_() for t in qkv(0, 0, 2, 1, 16, HALF, batch=1))
    out, lse = attend(q, k, v, cu_seqlens_q=torch.tensor([0]), return_lse=True)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape and lse.shape == (2, 0)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("seq_q", [1, 3, 40])
def test_decode(seq_q, heads):
    """In one part and in several, of caches that hold nothing, all, and more than there is."""
    dtype = NARROW[seq_q % 2]
    for batch, seqlens in ((1, [150]), (1, [333]), (3, [333, 0, 77]), (3, [1000, -1, 40])):
        q, k, v = qkv(seq_q, 333, *heads, 64, dtype, batch)
        call = partial(check_decode, q, k, v, torch.tensor(seqlens), "cuda")
        for options in ({}, {"window": 70}, {"window": (30, 2), "causal": False}, {"softcap": 3.0, "scale": -0.2}):
            call(**options, sinks=torch.randn(heads[0]) if options else None)


def test_parts_of_decode(simt):
    """The emulated GPU has four multiprocessors, of two blocks."""
    options = Options(0.125, UNBOUNDED, 0, 0.0)
    for batch, keys, splits in ((1, 500, 8), (1, 65, 2), (1, 64, 1), (2, 500, 4), (8, 500, 1)):
        q, k, v = qkv(1, keys, 1, 1, 64, HALF, batch)
        assert simt.cuda.attention_splits(q, k, v, options, 0) == splits
        check_decode(q, k, v, torch.tensor([keys] * (batch - 1) + [keys // 3]), "cuda")


def test_what_a_cache_does_not_hold_may_be_nan():
    q, k, v = qkv(2, 300, 4, 2, 40, BF16, batch=2)
    seqlens = torch.tensor([130, 7])
    before = decode(q, k, v, seqlens, return_lse=True)
    for i, n in enumerate(seqlens.tolist()):
        k[i, n:], v[i, n:] = torch.nan, torch.inf
    assert all(map(torch.equal, decode(q, k, v, seqlens, return_lse=True), before))


def test_explain_says_why_not(monkeypatch):
    def why(dim: int, dtype: torch.dtype) -> str:
        return explain(flash_attention, *qkv(5, 5, dim=dim, dtype=dtype)).reasons["cuda"]

    assert why(64, torch.float32).startswith("no: its kernels take float16 and bfloat16")
    assert why(257, BF16) == "no: its kernels take a head_dim up to 256"
    assert why(256, BF16).startswith("could run")
    with pytest.raises(ValueError, match="can't run this call: its kernels take float16 and bfloat16"):
        attend(*qkv(5, 5))
    monkeypatch.setattr(native, "cuda_missing", lambda device: "this GPU has compute capability 7.5")
    assert why(64, BF16) == "no: this GPU has compute capability 7.5"


def test_the_operators_take_no_float32():
    q, k, v = qkv(5, 5)
    with pytest.raises(ValueError, match="float32"):
        operators.attention_forward(
            q, k, v, None, Packing(None, None, 0, 0), Options(1.0, 9, 0, 0.0), True, True, "cuda"
        )
