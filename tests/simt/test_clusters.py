"""Thread-block clusters in the emulator: right kernels run rightly, and it finds what is wrong with the wrong ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from tests.simt.library import build_and_load, call

SEEDS = range(9)
FAULTS = {
    "no_start": "the other block may not have started",
    "no_barrier": "no barrier of the cluster came after a store",
    "no_arrival": "the thread waits without having arrived",
    "two_arrivals": "the thread has arrived before, and has not waited since",
    "one_warp_leaves": "224 of 256 threads at cluster_wait",
    "no_such_block": "there is no block 4 in a cluster of 4",
    "one_slot": "another thread stores there, too",
    "block_has_ended": "of the cluster has ended",
    "no_barrier_at_the_end": "no barrier of the cluster came after a store",
    "not_shared": "the address is not in the block's shared memory",
    "no_wait": "has arrived at a barrier of the cluster, and has not waited",
    "other_barrier": "met by threads that arrive elsewhere",
    "copy": "copies are not emulated in clusters",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build_and_load("selftest_clusters")


@pytest.fixture(autouse=True)
def in_order(library: ctypes.CDLL) -> Iterator[None]:
    library.simt_set_seed(0)
    yield
    library.simt_set_seed(0)


def tell(library: ctypes.CDLL, size: int, fault: int = 0, dynamic: bool = False) -> tuple[str | None, bool]:
    """The error, and whether each block of two clusters has got what those of its own have brought."""
    given, out = torch.randn(2 * size), torch.empty(2 * size, size)
    error = call(library, "run_tell", given, out, 2 * size, size, fault, dynamic)
    return error, torch.equal(out, given.view(2, 1, size).expand(2, size, size).reshape(2 * size, size))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks(library: ctypes.CDLL, size: int) -> None:
    out = torch.empty(3 * size, 3, dtype=torch.int32)
    assert call(library, "run_places", out, 0, 3 * size, 33, size) is None
    assert out.tolist() == [[block // size, block % size, size] for block in range(3 * size)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_blocks_tell_each_other(library: ctypes.CDLL, size: int, dynamic: bool) -> None:
    for seed in SEEDS:
        library.simt_set_seed(seed)
        assert tell(library, size, dynamic=dynamic) == (None, True)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=list(FAULTS))
def test_each_fault_is_found(library: ctypes.CDLL, number: int) -> None:
    message = list(FAULTS.values())[number - 1]
    found = []
    for seed in SEEDS:
        library.simt_set_seed(seed)
        error, _ = tell(library, 4, number)
        assert error is not None and "tell" in error and "block (" in error
        found.append(message in error)
    assert any(found), error
    library.simt_set_seed(0)
    assert tell(library, 4) == (None, True)  # the next grid runs as if nothing had been


def sums(library: ctypes.CDLL, seed: int, buffers: int) -> bool:
    library.simt_set_seed(seed)
    size, turns = 4, 6
    given, out = torch.randint(-9, 9, (size, turns)).float(), torch.empty(size * 64, turns)
    assert call(library, "run_sum_in_turns", given, out, size, turns, buffers) is None
    return torch.equal(out, given.sum(0).expand_as(out))


def test_one_buffer_is_overwritten_and_two_are_not(library: ctypes.CDLL) -> None:
    assert all(sums(library, seed, buffers=2) for seed in range(20))
    assert not all(sums(library, seed, buffers=1) for seed in range(20))


def test_launch_limits(library: ctypes.CDLL) -> None:
    out, active = torch.empty(16, 3, dtype=torch.int32), ctypes.c_int(-1)

    def run(device: int, grid: int, size: int) -> str | None:
        return call(library, "run_places", out, device, grid, 32, size)

    def clusters(device: int, size: int) -> int:
        assert call(library, "run_active_clusters", ctypes.byref(active), size, device) is None
        return active.value

    refused = "CUDA: places(int*): Invalid cluster size"
    assert run(0, 8, 8) is None and run(1, 8, 8) is None
    assert run(2, 8, 2) == refused and run(2, 8, 1) is None  # as an A100
    assert run(0, 9, 2) == refused  # not whole clusters
    assert run(0, 16, 16) == refused  # not yet allowed
    assert [clusters(0, size) for size in (2, 8, 16)] == [2, 2, 2]
    assert [clusters(1, size) for size in (2, 8, 16)] == [2, 2, 0]
    assert [clusters(2, size) for size in (2, 8, 16)] == [0, 0, 0]
    assert run(0, 16, 16) is None  # active_clusters has allowed it
    assert run(1, 16, 16) == refused


def test_launches_are_recorded(library: ctypes.CDLL) -> None:
    library.simt_launches.restype = ctypes.c_char_p
    library.simt_record(True)
    try:
        assert call(library, "run_places", torch.empty(6, 3, dtype=torch.int32), 0, 6, 32, 2) is None
        assert library.simt_launches().decode() == "places(int*)\t6\t1\t1\t32\t1\t1\t2\n"
    finally:
        library.simt_record(False)
