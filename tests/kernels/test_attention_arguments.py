"""Arguments of attention that change what a query sees or how tensors lie: windows, widths, layouts."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.kernels import flash_attention, flash_decode
from tests.kernels.attention_checks import check_same, plain_dtype


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, **options) -> Tensor:
    """PyTorch's own, of our layout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped, **options).transpose(1, 2)


def sdpa_of_the_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of the last queries, causal."""
    return sdpa(q, k, v, torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool())


@pytest.mark.parametrize("window", [(3, 5), (None, 4), (6, None), (-1, 2), (0, 0), (2**40, 3), (2, 2**63 - 1)], ids=str)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(70, 70), (9, 70)])
def test_a_window_of_two_sides(window, seq_q, seq_k, any_backend):
    dtype = plain_dtype(any_backend)
    q, k, v = torch.randn(1, seq_q, 4, 16, dtype=dtype), *torch.randn(2, 1, seq_k, 2, 16, dtype=dtype)
    ahead = torch.arange(seq_k) - torch.arange(seq_k - seq_q, seq_k).unsqueeze(1)
    left, right = (2**20 if n is None or n == -1 else min(n, 2**20) for n in window)
    seen = (ahead >= -left) & (ahead <= right)
    call = partial(flash_attention, window=window, backend=any_backend)
    check_same(partial(call, causal=False), partial(sdpa, seen=seen), q, k, v)
    seen &= ahead <= 0
    check_same(call, partial(sdpa, seen=seen), q, k, v)


def test_windows_past_every_key_are_none(any_backend):
    q, k, v = torch.randn(3, 1, 40, 2, 16, dtype=plain_dtype(any_backend))
    whole = flash_attention(q, k, v, backend=any_backend)
    call = partial(flash_decode, backend=any_backend)
    for window in (40, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**62, 2**63 - 1, 2**70):
        torch.testing.assert_close(flash_attention(q, k, v, window=window, backend=any_backend), whole)
        check_same(partial(call, window=window), sdpa_of_the_last, q[:, -2:], k, v, gradients=False)


def test_windows_that_mean_nothing_are_refused():
    q = torch.randn(1, 4, 2, 8)
    for window, options in ((0, {}), (-3, {}), (4, {"causal": False}), ((1, 2, 3), {})):
        for op in (flash_attention, flash_decode):
            with pytest.raises(ValueError, match=rf"{op.__name__}: window .*\(left, right\)"):
                op(q, q, q, window=window, **options)


@pytest.mark.parametrize("dims", [(24, 16), (16, 24), (32, 64), (40, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_values_of_another_width_than_keys(dims, causal, any_backend):
    dim, dim_v = dims
    randn = partial(torch.randn, dtype=plain_dtype(any_backend))
    q, k, v = randn(2, 33, 4, dim), randn(2, 33, 2, dim), randn(2, 33, 2, dim_v)
    call, other = partial(flash_attention, causal=causal, backend=any_backend), partial(sdpa, is_causal=causal)
    check_same(call, other, q, k, v)
    packed = partial(call, cu_seqlens_q=torch.tensor([0, 33]))
    check_same(lambda *given: packed(*(t[0] for t in given)).unsqueeze(0), other, q[:1], k[:1], v[:1], gradients=False)
    decode = partial(flash_decode, causal=causal, backend=any_backend)
    last = sdpa_of_the_last if causal else sdpa
    check_same(decode, last, q[:, -2:], k, v, gradients=False)


def test_several_queries_decode_without_causal(any_backend):
    randn = partial(torch.randn, dtype=plain_dtype(any_backend))
    q, cache = randn(3, 5, 4, 16), randn(2, 3, 30, 2, 16)
    lengths = torch.tensor([30, 7, 3])

    def each_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q[i : i + 1], *(t[i : i + 1, :n] for t in (k, v))) for i, n in enumerate(lengths)])

    decode = partial(flash_decode, cache_seqlens=lengths, causal=False, backend=any_backend)
    check_same(decode, each_alone, q, *cache, gradients=False)


@pytest.mark.parametrize("causal", [True, False])
def test_the_layout_of_sdpa(causal, any_backend):
    randn = partial(torch.randn, dtype=plain_dtype(any_backend))
    q, k, v = randn(2, 4, 33, 16), randn(2, 2, 33, 16), randn(2, 2, 33, 16)
    call = partial(flash_attention, layout="bhsd", causal=causal, backend=any_backend)
    check_same(call, partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True), q, k, v)
    out, lse = call(q, k, v, return_lse=True)
    other, other_lse = flash_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), causal=causal, return_lse=True, backend=any_backend
    )
    assert torch.equal(out, other.transpose(1, 2)) and torch.equal(lse, other_lse)
    for wrong in ({"layout": "bhds"}, {"layout": "bhsd", "cu_seqlens_q": torch.tensor([0, 33])}):
        with pytest.raises(ValueError, match="layout must be 'bshd' or, without cu_seqlens, 'bhsd'"):
            flash_attention(q, k, v, **wrong)


def test_more_queries_than_keys_get_a_hint():
    q, kv = torch.randn(1, 8, 33, 16), torch.randn(1, 2, 33, 16)  # [batch, heads, seq, head_dim]
    with pytest.warns(UserWarning, match='layout="bhsd"'):
        flash_attention(q, kv, kv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(q, kv, kv, layout="bhsd")
        flash_attention(q, kv, kv, causal=False)
        flash_attention(kv, q, q)
        flash_attention(q, kv[:, :0], kv[:, :0])


def test_one_program_is_exported_for_all_lengths():
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v)

    q = torch.randn(1, 40, 2, 8)
    seq = torch.export.Dim("seq", min=2, max=4096)
    program = torch.export.export(Attend(), (q, q, q), dynamic_shapes=({1: seq},) * 3).module()
    for n in (2, 5, 16, 17, 40, 300):
        q = torch.randn(1, n, 2, 8)
        torch.testing.assert_close(program(q, q, q), flash_attention(q, q, q))
