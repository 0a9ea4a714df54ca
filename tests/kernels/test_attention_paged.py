"""``flash_decode`` of a cache in pages; and results that depend on nothing but a query and the keys that it sees."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastllm.kernels import explain, flash_attention, flash_decode
from tests.conftest import IN_THE_INTERPRETER, INTERPRETED
from tests.kernels.attention_checks import qkv
from tests.numerics import DTYPES, assert_accurate, on_gpus

OPTIONS = ({}, {"window": 70}, {"softcap": 3.0, "scale": 0.2}, {"sinks": True}, {"window": (40, 1), "causal": False})


@pytest.fixture(params=["cpu", *INTERPRETED])
def paged_backend(request) -> str:
    return request.param


def in_pages(cache: Tensor, page_size: int, table: Tensor, spare: int = 3) -> Tensor:
    """A pool with a cache's tokens at the pages of ``table`` [batch, columns]; NaN wherever there is none."""
    batch, capacity, *rest = cache.shape
    pool = cache.new_full((int(table.max()) + 1 + spare, page_size, *rest), float("nan"))
    padded = cache.new_full((batch, table.shape[1] * page_size, *rest), float("nan"))
    padded[:, :capacity] = cache
    pool[table.long()] = padded.unflatten(1, (-1, page_size))
    return pool


def paged(k: Tensor, v: Tensor, page_size: int, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Both caches in pages of a random order, and the table, with ``more`` columns of no page."""
    columns = -(-k.shape[1] // page_size)
    table = torch.randperm(len(k) * columns + 5, device=k.device)[: len(k) * columns].view(len(k), columns).int()
    pools = (in_pages(x, page_size, table) for x in (k, v))
    return *pools, torch.cat([table, torch.full((len(k), more), -1, device=k.device).int()], 1)


def given(options: dict, heads: int, device: str = "cpu") -> dict:
    return options | ({"sinks": torch.randn(heads, device=device)} if "sinks" in options else {})


def check_paged(backend, seq_q, heads, dim, dtype, page_size, capacity, device="cpu") -> None:
    """As from a contiguous cache, by the rule."""
    q, k, v = qkv(seq_q, capacity, *heads, dim, dtype, batch=4, device=device)
    seqlens = torch.tensor([capacity, 1, capacity // 2 + 1, 0], device=device)
    k_pool, v_pool, table = paged(k, v, page_size, more=2)
    for options in OPTIONS:
        options = given(options, heads[0], device)
        call = partial(flash_decode, return_lse=True, **options)
        got = call(q, k_pool, v_pool, seqlens, block_table=table, backend=backend)
        plain = call(q, k, v, seqlens, backend="torch")
        wide = [t.double() for t in (q, k, v)]
        exact = partial(call, **{n: t.double() for n, t in options.items() if n == "sinks"})(
            *wide, seqlens, backend="torch"
        )
        assert_accurate(got[0], plain[0], exact[0], "out", exact[0].abs() + 1)
        seen = torch.isfinite(exact[1])
        assert torch.equal(torch.isfinite(got[1]), seen)
        torch.testing.assert_close(
            got[1][seen].double(), exact[1][seen], rtol=1e-5, atol=1e-4 if dtype.itemsize < 4 else 1e-5
        )


SHAPES = [(1, (4, 4), 64, 16), (1, (8, 2), 40, 32), (3, (6, 1), 128, 16), (5, (14, 2), 7, 64), (20, (2, 1), 16, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(paged_backend, shape, dtype):
    check_paged(paged_backend, *shape[:3], dtype, shape[3], 300 if paged_backend == "triton" else 1500)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_instruction_sets(instruction_set, dtype):
    for seq_q, heads, dim, page_size in SHAPES:
        check_paged("cpu", seq_q, heads, dim, dtype, page_size, 600)


def test_parts_of_many_keys_in_triton():
    check_paged("triton", 2, (4, 2), 16, torch.float32, 64, 1100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_specification(dtype):
    """It gathers the pages, and does what it does without."""
    q, k, v = qkv(3, 100, 4, 2, 16, dtype, batch=3)
    lengths = torch.tensor([100, 37, 0])
    k_pool, v_pool, table = paged(k, v, 16, more=1)
    call = partial(flash_decode, return_lse=True, backend="torch")
    for options in OPTIONS:
        options = given(options, 4)
        for index in (table, table.long()):
            got = call(q, k_pool, v_pool, lengths, block_table=index, **options)
            expected = call(q, k, v, lengths, **options)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_int64_tables_strides_and_lengths_outside(paged_backend):
    q, k, v = qkv(2, 80, 4, 2, 16, batch=2)
    k_pool, v_pool, table = paged(k, v, 16)
    lengths = torch.tensor([80, 33])
    call = partial(flash_decode, backend=paged_backend)
    expected = call(q, k_pool, v_pool, lengths, block_table=table)
    assert torch.equal(call(q, k_pool, v_pool, lengths, block_table=table.long()), expected)
    assert torch.equal(call(q, k_pool, v_pool, lengths, block_table=table.T.contiguous().T), expected)
    both = torch.stack([k_pool, v_pool], 2)  # one pool for both: strided pages
    assert torch.equal(call(q, both[:, :, 0], both[:, :, 1], lengths.int(), block_table=table), expected)
    beyond = torch.tensor([10**6, 33])
    assert torch.equal(call(q, k_pool, v_pool, beyond, block_table=table), expected)
    none = call(q, k_pool[:0], v_pool[:0], torch.tensor([0, -5]), block_table=table)
    assert torch.equal(none, torch.zeros_like(none))


def test_pages_outside_the_pool(paged_backend):
    """Nobody looks at those past the length or before the window; of those that are read it is an error."""
    q, k, v = qkv(2, 96, 4, 2, 16, batch=2)
    k_pool, v_pool, table = paged(k, v, 16)
    lengths, window = torch.tensor([96, 33]), 20
    call = partial(flash_decode, q, k_pool, v_pool, lengths, window=window)
    expected = call(block_table=table, backend=paged_backend)
    table[0, :4], table[1, 3:] = -1, 2**31 - 1  # token 94 sees 75 and later
    for backend in (paged_backend, "torch"):
        torch.testing.assert_close(call(block_table=table, backend=backend), expected)
    for wrong in (-1, len(k_pool), 2**40):
        bad = table.long()
        bad[0, 5] = wrong
        if paged_backend == "cpu":
            for backend in ("cpu", "torch"):
                named = wrong if backend == "torch" or abs(wrong) < 2**31 else 2**31 - 1
                with pytest.raises(
                    IndexError, match=f"block_table holds {named}, k_cache and v_cache hold {len(k_pool)}"
                ):
                    call(block_table=bad, backend=backend)
        else:
            got = call(block_table=bad, backend=paged_backend)
            assert bool(got[0].isnan().all()) and torch.equal(got[1], expected[1])


def test_refuses():
    q, k, v = qkv(1, 32, 4, 2, batch=2)
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 4])
    for pool, options, message in [
        (k, {"cache_seqlens": None}, "with block_table it needs cache_seqlens"),
        (k[:, :8], {}, "page_size, dimension 1 of k_cache and v_cache, must be a power of two of at least 16, not 8"),
        (k[:, :24], {}, "must be a power of two of at least 16, not 24"),
        (k, {"block_table": table[:1]}, r"block_table must be \[batch, max_pages\] for a batch of 2"),
        (k, {"block_table": table[0]}, r"block_table must be \[batch, max_pages\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            flash_decode(q, pool, pool, **{"cache_seqlens": lengths, "block_table": table, **options})
    with pytest.raises(TypeError, match="block_table must be int64 or int32"):
        flash_decode(q, k, k, lengths, block_table=table.float())


def test_cuda_reads_no_pages(simt):
    q, k, _ = qkv(1, 32, 4, 2, 16, torch.float16, batch=2)
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 4])
    found = explain(flash_decode, q, k, k, lengths, block_table=table)
    assert found.chosen == "cpu" and "reads no pages" in found.reasons["cuda"]
    with pytest.raises(ValueError, match="its kernel reads no pages"):
        flash_decode(q, k, k, lengths, block_table=table, backend="cuda")


def test_compiles_as_one_graph(paged_backend):
    q, k, v = qkv(2, 80, 4, 2, 16, batch=2)
    k_pool, v_pool, table = paged(k, v, 16)
    lengths = torch.tensor([80, 33])
    call = partial(flash_decode, backend=paged_backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    given = q, k_pool, v_pool, lengths
    assert torch.equal(compiled(*given, block_table=table), call(*given, block_table=table))
    options = (0.25, 4, 0, 0.0)
    torch.library.opcheck(
        torch.ops.fastllm.attention_decode,
        (q, *(x.nan_to_num() for x in (k_pool, v_pool)), lengths, table, None, *options, True, paged_backend),
        test_utils=("test_schema", "test_faketensor"),
    )


# ---- a row depends on nothing but its query and the keys that it sees ----


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_rows_are_independent(backend, dtype, dim, heads, lengths, most=5) -> None:
    """Alone and in company, one query at a time and several, in a small table and a large one: the same bits."""
    capacity = max(lengths)
    q, k, v = qkv(most, capacity, *heads, dim, dtype, batch=len(lengths))
    k_pool, v_pool, table = paged(k, v, 16)
    wide = torch.cat([table, torch.full((len(table), 200), -1, dtype=torch.int32)], 1)
    held = torch.tensor(lengths)
    for options in OPTIONS[:4]:
        call = partial(flash_decode, backend=backend, return_lse=True, **given(options, heads[0]))
        together = call(q, k_pool, v_pool, held, block_table=table)
        assert same(call(q, k_pool, v_pool, held, block_table=wide), together)
        for i, n in enumerate(lengths):
            expected = [t[i : i + 1] for t in together]
            columns = -(-n // 16)
            pools = k_pool, v_pool
            alone = call(q[i : i + 1], *pools, held[i : i + 1], block_table=table[i : i + 1, :columns])
            assert same(alone, expected), (options, n)
            for query in range(most):
                at = held[i : i + 1] - most + 1 + query
                if at <= 0:
                    continue
                one = call(q[i : i + 1, query : query + 1], *pools, at, block_table=table[i : i + 1])
                assert torch.equal(one[0][0, 0], expected[0][0, query]), (options, n, query)
                assert torch.equal(one[1][0, :, 0], expected[1][0, :, query]), (options, n, query)


LENGTHS = [513, 17, 1, 512, 700, 256, 255, 90]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "heads"), [(64, (9, 3)), (128, (8, 1)), (40, (7, 1))])
def test_decoded_rows_are_independent(instruction_set, dim, heads, dtype):
    check_rows_are_independent("cpu", dtype, dim, heads, LENGTHS)


@IN_THE_INTERPRETER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoded_rows_are_independent_in_triton(dtype):
    check_rows_are_independent("triton", dtype, 16, (6, 2), [600, 17, 1], most=4)


def test_pages_or_not_and_threads_don_t_matter(instruction_set):
    q, k, v = qkv(3, 700, 6, 2, 64, torch.bfloat16, batch=3)
    k_pool, v_pool, table = paged(k, v, 32)
    lengths, before = torch.tensor([700, 300, 5]), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            call = partial(flash_decode, return_lse=True, backend="cpu")
            results.append(call(q, k, v, lengths))
            results.append(call(q, k_pool, v_pool, lengths, block_table=table))
            results.append(call(q, k[:, :701], v[:, :701], lengths))
    finally:
        torch.set_num_threads(before)
    assert all(same(other, results[0]) for other in results[1:])


CUTS = ([1, 399], [37, 263, 100], [64, 192, 144], [31, 1, 33, 335])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_of_a_prompt_in_chunks_are_independent(instruction_set, dim, dtype):
    """Chunks of queries, each against all keys so far, beside chunks of another prompt: the bits of the whole."""
    q, k, v = (t[0] for t in qkv(400, 400, 4, 2, dim, dtype, batch=1))
    other = [t[0] for t in qkv(50, 77, 4, 2, dim, dtype, batch=1)]
    for options in (*OPTIONS[:4], {"scale": -0.1}, {"scale": 0.0}):
        call = partial(flash_attention, backend="cpu", return_lse=True, **given(options, 4))
        whole = call(q, k, v, cu_seqlens_q=torch.tensor([0, 400]))
        for cuts in CUTS:
            end = 0
            for count in cuts:
                start, end = end, end + count
                given_q = torch.cat([other[0], q[start:end], other[0]])
                given_k, given_v = (torch.cat([o, t[:end], o]) for o, t in zip(other[1:], (k, v), strict=True))
                cu_q = torch.tensor([0, 50, count, 50]).cumsum(0)
                cu_k = torch.tensor([0, 77, end, 77]).cumsum(0)
                out, lse = call(given_q, given_k, given_v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
                assert torch.equal(out[50 : 50 + count], whole[0][start:end]), (options, start, end)
                assert torch.equal(lse[:, 50 : 50 + count], whole[1][:, start:end]), (options, start, end)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(("gpu_backend", "dtype", "shape"), on_gpus(SHAPES, DTYPES), ids=str)
def test_paged_on_gpus(gpu_backend, dtype, shape):
    if gpu_backend == "triton":
        check_paged("triton", *shape[:3], dtype, shape[3], 1500, device="cuda")
