"""``rope_append``: the numbers of ``rope``, written where they belong and nowhere else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastllm.kernels import explain, rope, rope_append
from tests.conftest import IN_THE_INTERPRETER, INTERPRETED
from tests.numerics import DTYPES, on_gpus


@pytest.fixture(params=["cpu", *INTERPRETED, "torch"])
def append_backend(request) -> str:
    return request.param


def inputs(tokens=7, heads=6, kv_heads=2, dim=16, rotary=16, page_size=16, pages=3, dtype=torch.float32, device="cpu"):
    """q, k, v of one projection; cos, sin, positions; caches full of 7, and slots of which the last is none."""
    x = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
    q, k, v = x.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    angle = 100 * torch.randn(50, rotary // 2, device=device)
    positions = torch.randint(50, (tokens,), device=device)
    caches = [torch.full((pages, page_size, kv_heads, dim), 7.0, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.randperm(pages * page_size, device=device)[:tokens]
    slots[-1:] = -1
    return [q, k, v, angle.cos(), angle.sin(), positions, *caches, slots]


def check_append(backend, interleaved=False, **sizes) -> None:
    given = inputs(**sizes)
    q, k, v, cos, sin, positions, *caches, slots = given
    # rope's own tokens are those of a batch: bit by bit what the same backend gives
    expected_q, expected_k = rope(q, k, cos, sin, positions=positions, interleaved=interleaved, backend=backend)
    right = [cache.clone() for cache in caches]
    for at, key, value in zip(slots.tolist(), expected_k, v, strict=True):
        if at >= 0:
            right[0].flatten(0, 1)[at], right[1].flatten(0, 1)[at] = key, value
    got = rope_append(*given, interleaved=interleaved, backend=backend)
    assert torch.equal(got, expected_q) and got.is_contiguous()
    assert torch.equal(caches[0], right[0]) and torch.equal(caches[1], right[1])


SIZES = [
    {},
    {"tokens": 1, "heads": 1, "kv_heads": 1, "dim": 2, "rotary": 2},
    {"tokens": 13, "heads": 3, "kv_heads": 3, "dim": 5, "rotary": 2, "page_size": 5},
    {"tokens": 40, "heads": 9, "kv_heads": 3, "dim": 64, "rotary": 64},
    {"tokens": 20, "heads": 4, "kv_heads": 1, "dim": 80, "rotary": 24, "page_size": 32},
    {"tokens": 9, "heads": 2, "kv_heads": 1, "dim": 128, "rotary": 0},
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_of_rope(append_backend, dtype, interleaved):
    for sizes in SIZES:
        check_append(append_backend, interleaved, dtype=dtype, **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_of_rope_on_instruction_sets(instruction_set, dtype):
    for sizes in SIZES:
        for interleaved in (False, True):
            check_append("cpu", interleaved, dtype=dtype, **sizes)


def test_many_tokens_and_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        check_append("cpu", tokens=700, heads=9, kv_heads=3, dim=64, rotary=64, pages=60)
    finally:
        torch.set_num_threads(before)


def test_caches_side_by_side_int32_and_strided_indices(append_backend):
    given = inputs()
    q, k, v, cos, sin, positions, _, _, slots = given
    call = partial(rope_append, backend=append_backend)
    expected = call(*given)
    both = torch.full((3, 16, 2, 2, 16), 7.0)
    twice = (torch.stack([x, x], -1)[..., 0] for x in (positions.int(), slots.int()))
    at, to = twice
    apart = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]  # a last dimension that is strided
    got = call(*apart, cos, sin, at, both[:, :, 0], both[:, :, 1], to)
    assert torch.equal(got, expected)
    assert torch.equal(both[:, :, 0], given[6]) and torch.equal(both[:, :, 1], given[7])


def test_no_tokens(append_backend):
    given = inputs(tokens=0)
    assert rope_append(*given, backend=append_backend).shape == (0, 6, 16)
    assert bool((given[6] == 7).all())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_outside_raises_before_anything_is_written(backend):
    for place, value, message in [
        (5, 50, "positions holds 50, cos and sin hold 50 positions"),
        (5, -1, "positions holds -1, cos and sin hold 50 positions"),
        (8, 48, "slots holds 48, k_cache and v_cache hold 48 tokens"),
    ]:
        given = inputs()
        given[place][3] = value
        with pytest.raises(IndexError, match=f"rope_append: {message}"):
            rope_append(*given, backend=backend)
        assert bool((given[6] == 7).all() and (given[7] == 7).all())


@IN_THE_INTERPRETER
def test_outside_on_gpus():
    """NaN where the position is, nothing written where the slot is."""
    given, other = inputs(), inputs()
    other[:6], other[8] = [t.clone() for t in given[:6]], given[8].clone()
    given[5][0], given[8][1] = 50, 2**40
    other[8][1] = -1
    got, expected = (rope_append(*x, backend="triton") for x in (given, other))
    assert bool(got[0].isnan().all()) and torch.equal(got[1:], expected[1:])
    key = given[6].flatten(0, 1)[given[8][0]]
    assert bool(key.isnan().all())
    other[6].flatten(0, 1)[given[8][0]] = key
    assert torch.equal(given[6].nan_to_num(), other[6].nan_to_num()) and torch.equal(given[7], other[7])


def test_refuses():
    given = inputs()

    def changed(at: int, value) -> list[Tensor]:
        return [*given[:at], value, *given[at + 1 :]]

    q, k, _, cos, _, positions, cache, _, slots = given
    for wrong, error, message in [
        (changed(0, q[None]), ValueError, r"q must be \[tokens, heads, head_dim\]"),
        (changed(0, q[:, :0]), ValueError, "q must have a head"),
        (changed(1, k[:, :1]), ValueError, r"k must have shape \[7, 2, 16\]"),
        (changed(2, k.half()), TypeError, "v is float16 but q is float32"),
        (changed(3, cos.repeat(1, 2)), ValueError, r"cos must be \[max_seq, up to 8\]"),
        (changed(4, cos[:3]), ValueError, "sin must have shape"),
        (changed(5, positions.float()), TypeError, "positions must be int64 or int32"),
        (changed(5, positions[:2]), ValueError, r"positions must have shape \[7\]"),
        (changed(6, cache[0]), ValueError, r"k_cache must be \[pages, page_size, kv_heads, head_dim\]"),
        (changed(7, cache[:1]), ValueError, "v_cache must have shape"),
        (changed(7, cache[:1].expand_as(cache)), ValueError, "elements of v_cache share memory"),
        (changed(8, slots[:2]), ValueError, r"slots must have shape \[7\]"),
        (changed(0, q.clone().requires_grad_()), ValueError, "it has no gradient"),
    ]:
        with pytest.raises(error, match=f"rope_append: .*{message}|{message}"):
            rope_append(*wrong)
    found = explain(rope_append, *given)
    assert found.chosen == "cpu" and "no cuda kernel" in found.reasons["cuda"]


@pytest.mark.parametrize("backend", ["cpu", *INTERPRETED])
def test_compiles_as_one_graph(backend):
    given = inputs()
    again = [t.clone() for t in given]
    call = partial(rope_append, backend=backend)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*given), call(*again))
    assert torch.equal(given[6], again[6]) and torch.equal(given[7], again[7])
    *rest, k_cache, v_cache, slots = inputs()
    torch.library.opcheck(torch.ops.fastllm.rotate_append, (*rest, slots, k_cache, v_cache, False, backend))


def test_a_graph_sees_that_the_caches_changed():
    given = inputs()
    before = given[6]._version, given[7]._version
    rope_append(*given, backend="cpu")
    assert given[6]._version > before[0] and given[7]._version > before[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("gpu_backend", "dtype", "sizes"), on_gpus(SIZES, DTYPES), ids=str)
def test_on_gpus(gpu_backend, dtype, sizes):
    if gpu_backend == "triton":
        for interleaved in (False, True):
            check_append("triton", interleaved, dtype=dtype, device="cuda", **sizes)
