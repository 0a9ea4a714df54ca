"""The emulator itself: it runs right kernels rightly and finds what is wrong with the wrong ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from tests.simt.library import build_and_load, call


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build_and_load("selftest")


@pytest.fixture(autouse=True)
def in_order(library: ctypes.CDLL) -> Iterator[None]:
    library.simt_set_seed(0)
    yield
    library.simt_set_seed(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reduction(library: ctypes.CDLL, threads: int, seed: int) -> None:
    library.simt_set_seed(seed)
    values = torch.randint(-100, 100, (20, 3000)).float()  # whole numbers: any order gives the same sum
    out = torch.empty(20)
    assert call(library, "run_block_sum", values, out, 20, threads, 3000) is None
    assert torch.equal(out, values.sum(1))


def shifted(library: ctypes.CDLL, seed: int, with_barrier: bool) -> bool:
    library.simt_set_seed(seed)
    values, out = torch.randn(256), torch.empty(256)
    assert call(library, "run_shift", values, out, 256, with_barrier) is None
    return torch.equal(out[1:], values[:-1])


def test_a_missing_barrier_shows_when_threads_are_shuffled(library: ctypes.CDLL) -> None:
    assert shifted(library, 0, with_barrier=False)  # in order nobody would notice
    assert not any(shifted(library, seed, with_barrier=False) for seed in range(1, 9))
    assert all(shifted(library, seed, with_barrier=True) for seed in range(9))


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_that_not_all_threads_reach(library: ctypes.CDLL, seed: int) -> None:
    library.simt_set_seed(seed)
    message = call(library, "run_half_leaves")
    assert "half_leaves" in message and "block (" in message
    assert "32 of 64 threads at __syncthreads" in message and "32 of 64 threads ended" in message
    assert "another barrier" in call(library, "run_two_barriers")
    assert shifted(library, seed, with_barrier=True)  # the next grid runs as if nothing had been


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffle_whose_lanes_do_not_all_come(library: ctypes.CDLL, seed: int) -> None:
    library.simt_set_seed(seed)
    message = call(library, "run_wrong_shuffle", 0)
    assert "31 of 32 threads at __shfl_sync" in message and "mask 0xffffffff" in message
    assert "1 of 32 threads at __syncthreads" in message and "first (5, 0, 0)" in message
    assert "1 of 32 threads ended" in call(library, "run_wrong_shuffle", 1)
    assert "reads a lane that the mask does not name" in call(library, "run_wrong_shuffle", 2)
    assert "does not name the calling lane" in call(library, "run_outside_mask")


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
def test_shuffles_and_votes(library: ctypes.CDLL, argument: int, width: int) -> None:
    """Against the tables of PTX's shfl.sync: out of the segment, a lane reads itself."""
    library.simt_set_seed(argument + width)
    out = torch.empty(6, 64, dtype=torch.int32)
    assert call(library, "run_shuffles", out, argument, width) is None
    for thread in range(64):
        warp, lane = thread // 32 * 32, thread % 32
        first = lane // width * width
        inside = {
            0: first + argument % width,
            1: lane ^ argument if lane ^ argument < first + width else lane,
            2: lane - argument if lane - argument >= first else lane,
            3: lane + argument if lane + argument < first + width else lane,
        }
        assert {kind: out[kind, thread].item() - warp for kind in inside} == inside
        votes = [other for other in range(lane % 2, 32, 2) if other < argument]
        assert out[4, thread].item() & 0xFFFFFFFF == sum(1 << vote for vote in votes)
        assert out[5, thread].item() == (len(votes) > 0) + 2 * (len(votes) == 16)


def test_dynamic_shared_memory_is_poisoned_before_every_block(library: ctypes.CDLL) -> None:
    out = torch.zeros(128)
    assert call(library, "run_dynamic_memory", out, 3, 128, ctypes.c_size_t(512)) is None
    assert out.isnan().all()


@pytest.mark.parametrize("which", range(3))
def test_static_shared_memory_is_poisoned_before_every_block(library: ctypes.CDLL, which: int) -> None:
    for _ in range(2):
        out = torch.zeros(96)
        assert call(library, "run_static_memory", out, which, 3) is None
        assert out.isnan().all()


@pytest.mark.parametrize("kib", [100, 164, 228])
def test_shared_memory_of_other_gpus(library: ctypes.CDLL, kib: int) -> None:
    library.simt_set_shared_memory.argtypes, library.simt_set_shared_memory.restype = [ctypes.c_size_t], ctypes.c_bool
    out, value = torch.zeros(1), ctypes.c_int()
    limit = (kib - 1) << 10
    assert call(library, "run_dynamic_memory", out, 1, 1, ctypes.c_size_t(227 << 10)) is None
    assert library.simt_set_shared_memory(kib << 10)
    try:
        for attribute, expected in ((81, kib << 10), (97, limit)):
            assert call(library, "run_attribute", attribute, ctypes.byref(value)) is None
            assert value.value == expected
        assert call(library, "run_dynamic_memory", out, 1, 1, ctypes.c_size_t(limit)) is None
        assert "invalid argument" in call(library, "run_dynamic_memory", out, 1, 1, ctypes.c_size_t(limit + 1))
    finally:
        assert library.simt_set_shared_memory(228 << 10)
    assert not library.simt_set_shared_memory(229 << 10)


def test_launch_limits(library: ctypes.CDLL) -> None:
    out = torch.zeros(1024)
    assert call(library, "run_dynamic_memory", out, 1, 1, ctypes.c_size_t(227 << 10)) is None
    assert "invalid argument" in call(library, "run_dynamic_memory", out, 1, 1, ctypes.c_size_t((227 << 10) + 1))
    for blocks, threads in [(0, 32), (1, 0), (1, 1025)]:
        message = call(library, "run_dynamic_memory", out, blocks, threads, ctypes.c_size_t(0))
        assert message == "CUDA: dynamic_memory(float*): invalid configuration argument"


def on_device(library: ctypes.CDLL, device: int, threads: int) -> tuple[str | None, str]:
    """The error of a launch there, and what the runtime was called for."""
    out = torch.zeros(1024)
    library.simt_recorded.restype = ctypes.c_char_p
    library.simt_record(True)
    try:
        return call(library, "run_on_device", device, out, threads), library.simt_recorded().decode()
    finally:
        library.simt_record(False)


def test_a_launch_sets_its_device_and_sets_it_back(library: ctypes.CDLL) -> None:
    assert on_device(library, 1, 32) == (None, "cudaSetDevice(1), launch on 1, cudaSetDevice(0)")
    assert on_device(library, 0, 32) == (None, "cudaSetDevice(0), launch on 0")
    error, calls = on_device(library, 1, 1025)
    assert "invalid configuration argument" in error and calls == "cudaSetDevice(1), cudaSetDevice(0)"
    assert on_device(library, 3, 32) == ("CUDA: device 3: invalid device ordinal", "")
    assert library.simt_device() == 0


@pytest.mark.parametrize("readonly", [False, True])
def test_a_vector_that_is_not_aligned(library: ctypes.CDLL, readonly: bool) -> None:
    numbers, out = torch.arange(132.0), torch.zeros(132)
    numbers, out = (t[-t.data_ptr() % 16 // 4 :] for t in (numbers, out))
    assert call(library, "run_copy", numbers, out, 32, readonly) is None
    assert torch.equal(out[:128], numbers[:128])
    for pair in ((numbers[1:], out), (numbers, out[2:])):
        message = call(library, "run_copy", *pair, 31, readonly)
        assert "copy" in message and "is not aligned to 16 bytes" in message
    assert call(library, "run_copy", numbers, out, 32, readonly) is None


def test_division_without_a_call(library: ctypes.CDLL) -> None:
    most = 2**63 - 1
    powers = [1 << k for k in range(63)]
    divisors = sorted({p + d for p in powers for d in (-1, 0, 1) if p + d > 0} | {10**k for k in range(19)} | {most})
    divisors += torch.randint(1, most, (200,)).tolist() + torch.randint(1, 10**6, (200,)).tolist()
    random = [*torch.randint(0, most, (100,)).tolist(), *torch.randint(0, 10**6, (100,)).tolist()]
    for by in divisors:
        multiples = [k * by + d for k in (1, 2, 3, most // by // 2, most // by) for d in (-1, 0, 1)]
        numbers = [n for n in (*random, *multiples, 0, most) if 0 <= n <= most]
        given, quotients, rests = torch.tensor(numbers), *torch.empty(2, len(numbers), dtype=torch.int64)
        n, d = ctypes.c_int64(len(numbers)), ctypes.c_int64(by)
        assert call(library, "run_divide", given, n, d, quotients, rests) is None
        assert quotients.tolist() == [n // by for n in numbers]
        assert rests.tolist() == [n % by for n in numbers]


def test_reciprocal(library: ctypes.CDLL) -> None:
    """Of an approximation that is one step off, as the GPU's may be, it makes one that is half a step off."""
    numbers = torch.cat(
        [torch.linspace(1, 2, 10000), 2.0 ** torch.linspace(-126, 126, 10000), torch.arange(1.0, 10000)]
    )
    numbers = torch.cat([numbers, -numbers])
    approximate, out = torch.empty_like(numbers), torch.empty_like(numbers)
    assert call(library, "run_reciprocals", numbers, approximate, out, ctypes.c_int64(len(numbers))) is None
    exact = 1 / numbers.double()
    step = (torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()).double()
    inside = exact.abs() >= 2.0**-125  # below, the approximation may be 0
    assert (((approximate - exact) / step).abs()[inside] <= 1.5).all() and (approximate != exact.float())[inside].all()
    assert (((out - exact) / step).abs()[inside] <= 0.51).all()
    edge = torch.tensor([2.0**126, 2.0**-126, torch.nan])
    approximate, out = torch.empty(3), torch.empty(3)
    assert call(library, "run_reciprocals", edge, approximate, out, ctypes.c_int64(3)) is None
    assert out[1] == 2.0**126 and out[2].isnan()


@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_runs_once(library: ctypes.CDLL, seed: int) -> None:
    library.simt_set_seed(seed)
    out = torch.empty(2 * 3 * 5, dtype=torch.int32)
    assert call(library, "run_order", out, 2, 3, 5, 64) is None
    assert out.sort().values.tolist() == list(range(30))
    assert (out.tolist() == list(range(30))) == (seed == 0)


def test_16_bit_types_to_float32(library: ctypes.CDLL) -> None:
    bits = torch.arange(65536).to(torch.uint16)
    bf16, half = torch.empty(65536), torch.empty(65536)
    library.to_float32(*(ctypes.c_void_p(t.data_ptr()) for t in (bits, bf16, half)), ctypes.c_int64(65536))
    for ours, dtype in ((bf16, torch.bfloat16), (half, torch.float16)):
        theirs = bits.view(dtype).float()
        assert torch.equal(ours.isnan(), theirs.isnan())
        real = ~theirs.isnan()
        assert torch.equal(ours[real].view(torch.int32), theirs[real].view(torch.int32))


def test_float32_to_16_bit_types(library: ctypes.CDLL) -> None:
    random = torch.randint(-(2**31), 2**31, (1 << 20,)).to(torch.int32).view(torch.float32)
    around = torch.arange(65536).to(torch.uint16)
    exact = torch.cat([around.view(torch.float16).float(), around.view(torch.bfloat16).float()])
    between = (exact[1:] + exact[:-1]) / 2  # ties
    values = torch.cat([random, torch.randn(1 << 18), exact, between])
    for direction in (torch.inf, -torch.inf):
        values = torch.cat([values, torch.nextafter(between, torch.tensor(direction))])
    bf16, half = (torch.empty(len(values), dtype=torch.uint16) for _ in range(2))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, bf16, half))
    library.from_float32(*pointers, ctypes.c_int64(len(values)))
    for ours, dtype in ((bf16, torch.bfloat16), (half, torch.float16)):
        theirs = values.to(dtype)
        real = ~values.isnan()
        assert torch.equal(ours[real].view(torch.int16), theirs[real].view(torch.int16))
        assert (ours[~real].to(torch.int32) == 0x7FFF).all()
