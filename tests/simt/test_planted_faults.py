"""Attention's kernels with one fault at a time: the emulator, or the result, shows each."""

from __future__ import annotations

import ctypes

import pytest
import torch

from .planting import Fault, Planted

SEEDS = range(1, 9)
DIM, HEADS, KV_HEADS = 64, 2, 1
FORWARD, BACKWARD, DECODE = (f"attention_{name}.cu" for name in ("forward", "backward", "decode"))
ATTENTION = ("forward", "dkdv", "dq")
KERNELS = (*ATTENTION, "decode")
PASSES = {"forward": 0, "dkdv": 1, "dq": 1, "decode": 2}
# len_q, len_k, left, right: a block of rows sees nothing, and one a single column of a block of columns.
SIZES = {
    "forward": (300, 155, 48, 15),
    "dkdv": (150, 400, 115, 7),
    "dq": (300, 155, 48, 15),
    "decode": (3, 300, 280, 0),
}
WRITES = {"dkdv": ("dk", "dv"), "dq": ("dq",)}  # of a backward pass, which runs both


def missing(kernels: tuple[str, ...], file: str, barrier: str, count: int, behind: str = "") -> list[Fault]:
    return [Fault(f"no {barrier} {i}", kernels, file, f"{barrier}();", f"if (!ON) {barrier}();", i, behind)
            for i in range(count)]  # fmt: skip


def early(kernel: str, file: str, counts: tuple[str, ...], behind: str = "") -> list[Fault]:
    """One group of copies more is under way than should be."""
    faults = []
    for i, count in enumerate(counts):
        right = f"wait_copies<{count}>();"
        wrong = f"if (ON) wait_copies<{count} + 1>(); else {right}"
        faults.append(Fault(f"early wait {i}", (kernel,), file, right, wrong, counts[:i].count(count), behind))
    return faults


DKDV, DQ = "attention_dkdv_kernel(", "attention_dq_kernel("
FAULTS = [
    *missing(("forward",), FORWARD, "__syncthreads", 3),
    *missing(("dkdv",), BACKWARD, "__syncthreads", 5, DKDV),
    *missing(("dq",), BACKWARD, "__syncthreads", 4, DQ),
    *missing(("decode",), DECODE, "__syncthreads", 4),
    # No order shows the second of decode, nor the first of store_rows: what comes before them, mma.sync, waits for the
    # whole warp. Nor does a group more under way after a loop: it is empty, but of forward.
    *missing(("decode",), DECODE, "__syncwarp", 1),
    Fault("no __syncwarp", ATTENTION, "tile.h", "__syncwarp();", "if (!ON) __syncwarp();", 1),
    *early("forward", FORWARD, ("0", "0", "0")),
    *early("dkdv", BACKWARD, ("1", "0"), DKDV),
    *early("dq", BACKWARD, ("1", "0"), DQ),
    *early("decode", DECODE, ("kStages", "kStages - 1")),
    Fault("swizzle of load_tile", KERNELS, "tile.h", "tile.at(row, unit), source", "tile.at(row, unit ^ ON), source"),
    Fault("swizzle of store_rows", ATTENTION, "tile.h", "row + r, i % kUnits)", "row + r, i % kUnits ^ ON)"),
    Fault("first of Band", ATTENTION, "attention_parts.h", "row + shift - left)", "row + shift - left + ON)"),
    Fault("end of Band", KERNELS, "attention_parts.h", "shift + right + 1)", "shift + right + 1 + ON)"),
    Fault("first of mask", KERNELS, "attention_parts.h", "n * 8 + c < first", "n * 8 + c < first + ON"),
    Fault("end of mask", KERNELS, "attention_parts.h", "n * 8 + c >= end", "n * 8 + c >= end + ON"),
]
CASES = [(number, kernel) for number, fault in enumerate(FAULTS, 1) for kernel in fault.kernels]


class Tensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "dout", "out", "lse", "delta", "dq", "dk", "dv")]


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("len_q", "len_k", "heads", "kv_heads", "left", "right")]


class Kernels(Planted):
    """The kernels with their faults, on the same inputs every time."""

    def __init__(self) -> None:
        flags = ("-DFASTLLM_ELEMENT=__nv_bfloat16", f"-DFASTLLM_DIM={DIM}")
        super().__init__(
            "planted", FAULTS, (FORWARD, BACKWARD, DECODE), [ctypes.c_int, ctypes.c_int, Tensors, Sizes], flags
        )
        self.inputs = {kernel: self.inputs_of(kernel) for kernel in KERNELS}
        self.right = {kernel: self.call(kernel, 0, 0) for kernel in KERNELS}

    def inputs_of(self, kernel: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        len_q, len_k, *_ = SIZES[kernel]
        q, dout, out = (torch.randn(len_q, HEADS, DIM).bfloat16() for _ in range(3))
        k, v = (torch.randn(len_k, KV_HEADS, DIM).bfloat16() for _ in range(2))
        given = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": torch.zeros(HEADS, len_q)}
        if PASSES[kernel] == 1:
            self.run(0, 0, given, SIZES[kernel])
            given["delta"] = (dout.float() * out.float()).sum(-1).t().contiguous()
        return given

    def run(self, what: int, fault: int, tensors: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> str | None:
        pointers = Tensors(**{name: t.data_ptr() for name, t in tensors.items()})
        error = self.library.run(what, fault, pointers, Sizes(*sizes[:2], HEADS, KV_HEADS, *sizes[2:]))
        return None if error is None else error.decode()

    def call(self, kernel: str, fault: int, seed: int) -> list[torch.Tensor] | str:
        """The kernel's results, or the error's message."""
        given = self.inputs[kernel]
        written = {f"d{name}": torch.zeros_like(given[name]) for name in "qkv"}
        if PASSES[kernel] != 1:
            written = {name: torch.zeros_like(given[name]) for name in ("out", "lse")}
        self.library.simt_set_seed(seed)
        error = self.run(PASSES[kernel], fault, given | written, SIZES[kernel])
        self.library.simt_set_seed(0)
        return error or [written[name] for name in WRITES.get(kernel, written)]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_fault_every_order_gives_the_same(kernels, kernel):
    assert not any(kernels.shows(kernel, 0, seed) for seed in SEEDS)
    assert all(not t.isnan().any() and t.any() for t in kernels.right[kernel])


@pytest.mark.parametrize(("number", "kernel"), CASES, ids=[f"{k}, {FAULTS[n - 1].what}" for n, k in CASES])
def test_each_fault_shows(kernels, number, kernel):
    assert any(kernels.shows(kernel, number, seed) for seed in SEEDS)
