"""Copies, ldmatrix and mma.sync in the emulator, against PTX's definitions, and what it finds in wrong kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.simt.build import SIMT
from tests.simt.library import build_and_load, call

SOURCE = (SIMT / "selftest_tensor_cores.cu").read_text().splitlines()
NONE, NO_WAIT, WAIT_TOO_SHORT, NO_BARRIER, WARP_BARRIER, BEGINS_EARLY, ENDS_EARLY = range(7)
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build_and_load("selftest_tensor_cores")


@pytest.fixture(autouse=True)
def in_order(library: ctypes.CDLL) -> Iterator[None]:
    library.simt_set_seed(0)
    yield
    library.simt_set_seed(0)


def place(kernel: str, text: str) -> str:
    """FILE:LINE of the first line with ``text`` in a kernel."""
    start = next(i for i, line in enumerate(SOURCE) if f"void {kernel}(" in line)
    return f"selftest_tensor_cores.cu:{next(i + 1 for i in range(start, len(SOURCE)) if text in SOURCE[i])}"


# ---- mma.sync ------------------------------------------------------------------------------------


def of_a(lane: int, i: int) -> tuple[int, int]:
    """Row and column of a lane's i-th element of A, as the PTX ISA states them for m16n8k16 with .f16 and .bf16."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, column


def of_b(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8), group


def of_d(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def to_lanes(matrices: Tensor, where, per_lane: int) -> Tensor:
    """[warps, rows, columns] as [warps, 32, elements of a lane]."""
    rows, columns = torch.tensor([[where(lane, i) for i in range(per_lane)] for lane in range(32)]).unbind(-1)
    return matrices[:, rows, columns].contiguous()


def multiply(library: ctypes.CDLL, a: Tensor, b: Tensor, d: Tensor, times: int = 1) -> Tensor:
    out = torch.empty(len(a), 32, 4)
    registers = to_lanes(d, of_d, 4), to_lanes(a, of_a, 8), to_lanes(b, of_b, 4)
    half = a.dtype == torch.float16
    assert call(library, "run_multiply", half, *registers, out, len(a), times) is None
    result = torch.full_like(d, -1)
    rows, columns = torch.tensor([[of_d(lane, i) for i in range(4)] for lane in range(32)]).unbind(-1)
    result[:, rows, columns] = out
    return result


def truncated(x: Tensor) -> Tensor:
    """float64 to float32, towards zero; what is beyond the largest is infinite."""
    nearest = x.float()
    return torch.where(nearest.abs() > x.abs(), torch.nextafter(nearest, torch.tensor(0.0)), nearest).where(
        x.abs() < 2.0**128, nearest
    )


def exact_product(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    for block in (slice(0, 8), slice(8, 16)):
        products = a[:, :, block, None] * b[:, None, block, :]  # exact
        terms = torch.cat([d.double().unsqueeze(2), products], 2).transpose(2, 3).flatten(0, 2)
        d = truncated(torch.tensor([math.fsum(row) for row in terms.tolist()], dtype=torch.float64)).view_as(d)
    return d


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", HALVES)
def test_multiply(library: ctypes.CDLL, dtype: torch.dtype, seed: int) -> None:
    library.simt_set_seed(seed)
    a, b, d = torch.randn(4, 16, 16).to(dtype), torch.randn(4, 16, 8).to(dtype), torch.randn(4, 16, 8)
    d[1] = 0
    d[2] *= 1e4
    if dtype == torch.bfloat16:  # subnormal sums
        a[3], b[3], d[3] = a[3] * 2.0**-66, b[3] * 2.0**-66, d[3] * 2.0**-132
    assert torch.equal(multiply(library, a, b, d), exact_product(a, b, d))


@pytest.mark.parametrize("dtype", HALVES)
def test_multiply_puts_each_element_in_its_place(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    a = torch.randint(-8, 8, (1, 16, 16)).to(dtype)
    identity = torch.eye(16, dtype=dtype)[None]
    for columns in (slice(0, 8), slice(8, 16)):
        part = multiply(library, a, identity[:, :, columns], torch.zeros(1, 16, 8))
        assert torch.equal(part, a[:, :, columns].float())
    b = torch.randint(-8, 8, (1, 16, 8)).to(dtype)
    d = torch.randint(-99, 99, (1, 16, 8)).float()
    assert torch.equal(multiply(library, identity, b, d), b.float() + d)
    assert torch.equal(multiply(library, a, b, d, times=3), 3 * (a.float() @ b.float()) + d)


@pytest.mark.parametrize("dtype", HALVES)
def test_multiply_with_every_kind_of_number(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = torch.arange(65536).to(torch.uint16).view(dtype)
    a = values.view(256, 16, 16)
    for column in (1.0, -2.0):
        b = torch.zeros(256, 16, 8, dtype=dtype)
        b[:, :8, :] = column * torch.eye(8, dtype=dtype)
        finite = a.where(a.isfinite(), torch.zeros_like(a))
        assert torch.equal(multiply(library, finite, b, torch.zeros(256, 16, 8)), column * finite[:, :, :8].float())
        ours = multiply(library, a, b, torch.zeros(256, 16, 8))  # 0 times what is not finite is NaN
        assert torch.equal(ours.isnan(), (~a.isfinite().all(2, keepdim=True)).expand(ours.shape))
    ones = torch.ones(1, 16, 8, dtype=dtype)
    a = torch.zeros(1, 16, 16, dtype=dtype)
    a[0, 3, 5] = torch.inf
    assert multiply(library, a, -ones, torch.zeros(1, 16, 8))[0, 3].eq(-torch.inf).all()
    a[0, 3, 12] = -torch.inf
    assert multiply(library, a, ones, torch.zeros(1, 16, 8))[0, 3].isnan().all()
    large = torch.full((1, 16, 16), torch.finfo(dtype).max, dtype=dtype)
    d = torch.full((1, 16, 8), torch.finfo(torch.float32).max)
    beyond = torch.inf if dtype == torch.bfloat16 else d[0, 0, 0]  # the sum of float16's largest products is no step
    for sign in (1, -1):
        assert (multiply(library, large, sign * large[:, :, :8], sign * d) == sign * beyond).all()
    assert multiply(library, large, -large[:, :, :8], d.fill_(torch.inf)).eq(torch.inf).all()


def test_multiply_truncates(library: ctypes.CDLL) -> None:
    """After each 8 terms, towards zero: quarters of the step above 1, and halves of the step below."""
    b, quarter = torch.ones(1, 16, 8, dtype=torch.bfloat16), 2.0**-25
    for first, second, steps in ((8, 0, 2), (3, 3, 0), (4, 4, 2), (7, 8, 3), (-1, 0, -0.5), (-1, -1, -1)):
        a = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
        a[:, :, : abs(first)] = math.copysign(quarter, first)
        a[:, :, 8 : 8 + abs(second)] = math.copysign(quarter, second)
        for sign in (1, -1):
            out = multiply(library, sign * a, b, torch.full((1, 16, 8), float(sign)))
            assert (out == sign * (1 + steps * 2.0**-23)).all()


# ---- ldmatrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(library: ctypes.CDLL, transposed: bool, seed: int) -> None:
    """Against the table of the PTX ISA: thread t holds elements 2 (t % 4) and the next of row t / 4 of each matrix."""
    library.simt_set_seed(seed)
    rows = torch.randint(-(2**15), 2**15, (128, 8), dtype=torch.int16)
    picked = torch.randint(0, 128, (32,), dtype=torch.int32)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    assert call(library, "run_load_rows", rows, picked, out, transposed) is None
    matrices = rows[picked.long()].view(4, 8, 8)
    for lane in range(32):
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert torch.equal(out[lane, i], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


def test_load_matrices_of_static_shared_memory(library: ctypes.CDLL) -> None:
    rows, out = torch.randint(-(2**15), 2**15, (32, 8), dtype=torch.int16), torch.empty(32, 4, 2, dtype=torch.int16)
    assert call(library, "run_load_static", rows, out) is None
    assert torch.equal(out.view(8, 4, 4, 2).transpose(1, 2).transpose(0, 1).reshape(4, 8, 8), rows.view(4, 8, 8))


def test_load_matrices_of_a_wrong_address(library: ctypes.CDLL) -> None:
    assert call(library, "run_load_at", 1008) is None
    for offset, wrong in (
        (8, "not aligned to 16 bytes"),
        (1024, "not in the block's shared"),
        (-16, "not in the block"),
    ):
        message = call(library, "run_load_at", offset)
        assert wrong in message and "thread (9, 0, 0)" in message and place("load_at", "load_matrices(") in message


# ---- copies --------------------------------------------------------------------------------------


def run_ring(library: ctypes.CDLL, seed: int, stages: int, tiles: int, fault: int = NONE) -> str | None:
    """The error, after a check of the result where there is none."""
    library.simt_set_seed(seed)
    rows = torch.randint(-(2**15), 2**15, (tiles, 64, 8), dtype=torch.int16)
    out = torch.empty(tiles, 2, 2, 32, 4, 2, dtype=torch.int16)
    error = call(library, "run_ring", rows, out, tiles, stages, fault)
    if error is None:
        rows[1::2, 56:] = 0
        expected = rows.view(tiles, 1, 2, 4, 8, 4, 2).permute(0, 1, 2, 4, 5, 3, 6).reshape(tiles, 1, 2, 32, 4, 2)
        assert torch.equal(out, expected.expand(out.shape))
    return error


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_a_ring_of_copies(library: ctypes.CDLL, tiles: int, stages: int, seed: int) -> None:
    assert run_ring(library, seed, stages, tiles) is None


NOT_BROUGHT = "has not brought yet (wait_copies)"
NOT_VISIBLE = "has brought, but no barrier since the wait at "
FAULTS = {
    NO_WAIT: (NOT_BROUGHT,),
    WAIT_TOO_SHORT: (NOT_BROUGHT,),
    NO_BARRIER: (NOT_VISIBLE, NOT_BROUGHT),
    WARP_BARRIER: (NOT_VISIBLE, NOT_BROUGHT),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_ring_that_reads_early(library: ctypes.CDLL, fault: int, stages: int, seed: int) -> None:
    message = run_ring(library, seed, stages, 6, fault)
    assert any(wrong in message for wrong in FAULTS[fault])
    assert "ring<" in message and place("ring", "load_matrices(") in message
    assert f"{place('ring', 'copy_async(')}, of thread (" in message
    if NOT_VISIBLE in message:
        assert place("ring", "wait_copies<kStages - 2>") in message
    elif seed == 0:
        assert fault in (NO_WAIT, WAIT_TOO_SHORT)
    assert run_ring(library, seed, stages, 6) is None  # the next grid runs as if nothing had been


@pytest.mark.parametrize("stages", [2, 3])
def test_a_ring_that_overwrites_what_is_read(library: ctypes.CDLL, stages: int) -> None:
    def found(seed: int) -> bool:
        try:
            message = run_ring(library, seed, stages, 6, BEGINS_EARLY)
        except AssertionError:  # a wrong result
            return True
        assert message is None or (NOT_BROUGHT in message and place("ring", "load_matrices(") in message)
        return message is not None

    assert any(found(seed) for seed in range(1, 9))


@pytest.mark.parametrize("stages", [2, 3])
def test_a_thread_that_ends_before_its_copies(library: ctypes.CDLL, stages: int) -> None:
    message = run_ring(library, 0, stages, 6, ENDS_EARLY)
    assert "has not waited for this copy" in message and place("ring", "copy_async(") in message


def test_a_barrier_of_the_warp(library: ctypes.CDLL) -> None:
    rows, out = torch.randint(-(2**15), 2**15, (64, 8), dtype=torch.int16), torch.empty(64, 4, 2, dtype=torch.int16)
    assert call(library, "run_own_rows", rows, out, True) is None
    assert torch.equal(out.view(2, 8, 4, 4, 2).permute(0, 3, 1, 2, 4).reshape(64, 8), rows)
    message = call(library, "run_own_rows", rows, out, False)
    assert NOT_VISIBLE in message and place("own_rows", "load_matrices(") in message


def test_a_wrong_swizzle(library: ctypes.CDLL) -> None:
    rows, out = torch.randint(-(2**15), 2**15, (16, 4, 16), dtype=torch.int16), torch.empty(4, 32, 4, 2).short()
    expected = torch.empty(4, 32, 4, 2, dtype=torch.int16)
    for k in range(4):
        for lane in range(32):
            for i in range(4):
                row, column = lane // 4 + i % 2 * 8, lane % 4 * 2 + i // 2 * 8
                expected[k, lane, i] = rows[row, k, column : column + 2]
    assert call(library, "run_swizzled", rows, out, True) is None
    assert torch.equal(out, expected)
    assert call(library, "run_swizzled", rows, out, False) is None
    assert not torch.equal(out, expected)


def test_a_copy_is_nan_until_the_wait(library: ctypes.CDLL) -> None:
    rows = torch.randint(0, 2**31 - 1, (32, 4), dtype=torch.int32)
    before, after = torch.empty(2, 32, dtype=torch.int32)
    assert call(library, "run_plain_reads", rows, before, after) is None
    assert (before == -1).all() and torch.equal(after, rows[:, 0])


def test_wrong_copies(library: ctypes.CDLL) -> None:
    rows = torch.zeros(64, dtype=torch.int32)
    rows = rows[-rows.data_ptr() % 16 // 4 :]

    def copy(source: int = 0, to: int = 0, times: int = 1, commit: bool = True, wait: bool = True) -> str | None:
        message = call(library, "run_copy_at", rows, source, to, times, commit, wait)
        assert message is None or place("copy_at", "copy_async(") in message
        return message

    assert copy() is None and copy(source=16, to=1008) is None
    assert "source is not aligned to 16 bytes" in copy(source=8)
    assert "destination is not aligned to 16 bytes" in copy(to=24)
    for outside in (1024, -16):
        assert "not in the block's dynamic shared memory" in copy(to=outside)
    assert "writes shared memory that the copy at" in copy(times=2)
    for left in ({"wait": False}, {"commit": False}, {"commit": False, "wait": False}):
        assert "has not waited for this copy" in copy(**left)


# ---- approximate_exp2 ----------------------------------------------------------------------------


def test_exp2(library: ctypes.CDLL) -> None:
    """A step off, up and down, but for whole numbers; no subnormal numbers."""
    x = torch.cat([torch.linspace(-125.9, 127.9, 20000), torch.linspace(-1, 1, 10001), torch.arange(-126.0, 128.0)])
    out = torch.empty_like(x)
    assert call(library, "run_exp2", x, out, len(x)) is None
    exact = torch.exp2(x.double()).float()
    off = out.view(torch.int32) - exact.view(torch.int32)
    whole = x == x.round()
    assert (off[whole] == 0).all() and (off[~whole].abs() == 1).all()
    assert 0.4 < (off[~whole] == 1).float().mean() < 0.6

    x = torch.tensor([-torch.inf, -1e9, -149.0, -126.5, 1e-40, -1e-40, 0.0, 128.0, torch.inf, torch.nan])
    out = torch.empty_like(x)
    assert call(library, "run_exp2", x, out, len(x)) is None
    assert out[:9].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, torch.inf, torch.inf] and out[9].isnan()
