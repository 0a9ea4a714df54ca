"""Every op of nothing: each size that may be 0, alone and with others, in memory that was filled with NaN before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
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
from fastllm.kernels.attention import operators, reference
from fastllm.kernels.attention.options import Options, bounds
from fastllm.kernels.attention.packing import Packing
from tests.kernels.attention_checks import plain_dtype
from tests.numerics import with_gradients


@pytest.fixture(autouse=True)
def uninitialised_is_nan():
    """Whatever a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def some_zero(sizes: dict[str, int], most: int = 3) -> Iterator[dict[str, int]]:
    """The sizes, with every choice of up to ``most`` of them set to 0."""
    for count in range(1, most + 1):
        for names in itertools.combinations(sizes, count):
            yield sizes | dict.fromkeys(names, 0)


def results(call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], backend: str) -> list[Tensor] | str:
    """Outputs and gradients, or the error."""
    try:
        out = call(*inputs, backend=backend)
        grads = [torch.ones_like(t) for t in (out if isinstance(out, tuple) else (out,))]
        return with_gradients(lambda *leaves: call(*leaves, backend=backend), inputs, grads)
    except ValueError as error:
        return str(error)


def index(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-1], dtype=torch.int64)


def angles(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[-1] // 2)


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "rms_norm": lambda x, w, v, **given: rms_norm(x, w, residual=x * 2, **given),
    "softmax": lambda x, w, v, **given: softmax(x, causal=True, **given),
    "cross_entropy": lambda x, w, v, **given: cross_entropy(x, index(x), return_lse=True, **given),
    "linear_cross_entropy": lambda x, w, v, **given: linear_cross_entropy(x, v, index(x), reduction="sum", **given),
    "linear_log_prob": lambda x, w, v, **given: linear_log_prob(x, v, index(x), **given),
    "linear_jsd": lambda x, w, v, **given: linear_jsd(x, v, x * 2, v, mask=index(x) == 0, **given),
    "rope": lambda x, w, v, **given: rope(x.unsqueeze(2), x.unsqueeze(2), *(angles(x),) * 2, **given),
    "swiglu": lambda x, w, v, **given: swiglu(x, x * 2, **given),
}


@pytest.mark.parametrize("op", OPS)
def test_ops(op, backend):
    """As PyTorch's, values, shapes and gradients; where the op takes no size of 0, a ValueError from every backend."""
    for n in some_zero({"batch": 2, "rows": 3, "cols": 8, "classes": 5}):
        if op.startswith("linear") and (n["cols"] == 0 or backend == "cuda"):
            continue
        inputs = [
            torch.randn(n["batch"], n["rows"], n["cols"]),
            torch.randn(n["cols"]),
            torch.randn(n["classes"], n["cols"]),
        ]
        call = OPS[op]

        def used(*leaves: Tensor, call=call, **given) -> tuple[Tensor, ...]:
            out = call(*leaves, **given)
            out = out if isinstance(out, tuple) else (out,)
            return *out, *(t.sum() for t in leaves)  # each has a gradient

        found, expected = (results(used, inputs, b) for b in (backend, "torch"))
        if isinstance(expected, str):
            assert isinstance(found, str) and found.split(":")[0] == expected.split(":")[0], (n, found, expected)
            continue
        assert not isinstance(found, str), (n, found)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, n=n: f"{n}: {m}")


def attention_inputs(n: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    q = torch.randn(n["batch"], n["seq_q"], n["heads"], n["dim"], dtype=dtype)
    k = torch.randn(n["batch"], n["seq_k"], n["kv_heads"], n["dim"], dtype=dtype)
    return [q, k, torch.randn(n["batch"], n["seq_k"], n["kv_heads"], n["dim_v"], dtype=dtype)]


def check_attention(n: dict[str, int], backend: str, causal: bool, packed: bool) -> None:
    """The operators, which take sizes that the public functions refuse, against the specification."""
    q, k, v = inputs = attention_inputs(n, plain_dtype(backend))
    options, packing, cu = Options(0.3, *bounds("", causal, None), 0.0), Packing(None, None, 0, 0), [None, None]
    if packed:
        q, k, v = inputs = [t.flatten(0, 1) for t in inputs]
        cu = [torch.arange(n["batch"] + 1) * n[length] for length in ("seq_q", "seq_k")]
        packing = Packing(*cu, n["seq_q"], n["seq_k"])
    where = f"{n} causal={causal} packed={packed}"
    out, lse = operators.attention_forward(q, k, v, None, packing, options, True, True, backend)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = operators.attention_backward(dout, dlse, q, k, v, out, lse, packing, options, False, backend)[:3]
    if n["heads"] == 0 or n["kv_heads"] == 0:
        assert out.numel() == lse.numel() == 0 and out.shape == (*q.shape[:-1], v.shape[-1]), where
        assert not any(g.any() for g in grads), where
        return

    def spec(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return reference.flash_attention(*leaves, causal=causal, scale=0.3, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])

    dlse = torch.where(lse.isinf(), 0.0, dlse)
    expected = with_gradients(spec, inputs, [dout, dlse])
    for a, b in zip((out, lse, *grads), expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("packed", [False, True])
def test_attention(backend, packed):
    sizes = {"batch": 2, "seq_q": 3, "seq_k": 4, "heads": 4}
    if backend != "triton":
        sizes |= {"kv_heads": 2}
    if backend == "cpu":  # the others' launchers take no row of nothing, which the public functions refuse
        sizes |= {"dim": 8, "dim_v": 6}
    for n in some_zero(sizes):
        n = {"kv_heads": 2, "dim": 8, "dim_v": 8, **n}
        if n["kv_heads"] or not n["heads"]:
            check_attention(n, backend, True, packed)
            check_attention(n, backend, False, packed)


def test_decode(backend):
    sizes = {"batch": 2, "seq_q": 2, "seq_k": 4, "heads": 4}
    if backend != "triton":
        sizes |= {"kv_heads": 2}
    if backend == "cpu":  # the others' launchers take no row of nothing, which the public functions refuse
        sizes |= {"dim": 8, "dim_v": 6}
    for n, holds, causal in itertools.product(some_zero(sizes), (None, 0, 3), (False, True)):
        n = {"kv_heads": 2, "dim": 8, "dim_v": 8, **n}
        if not n["kv_heads"] and n["heads"]:
            continue
        q, k, v = attention_inputs(n, plain_dtype(backend))
        lengths = None if holds is None else torch.full((n["batch"],), holds)
        out, lse = operators.attention_decode(
            q, k, v, lengths, None, None, Options(0.3, *bounds("", causal, None), 0.0), True, backend
        )
        keys = min(n["seq_k"], n["seq_k"] if holds is None else holds)
        if n["heads"] == 0:
            assert out.numel() == lse.numel() == 0
            continue
        expected = reference.flash_attention(q, k[:, :keys], v[:, :keys], causal=causal, scale=0.3)
        for a, b in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, n=n, holds=holds: f"{n} {holds}: {m}")


def test_no_heads_of_queries(backend):
    q, k = (torch.randn(s, dtype=plain_dtype(backend), requires_grad=True) for s in ((1, 4, 0, 16), (1, 5, 1, 16)))
    out = flash_attention(q, k, k, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape and torch.equal(k.grad, torch.zeros_like(k))
    assert flash_decode(q.detach(), k.detach(), k.detach(), backend=backend).shape == q.shape
