"""The kernels whose rows a cluster shares with one fault at a time: the emulator, or the result, shows each."""

from __future__ import annotations

import ctypes

import pytest
import torch

from .planting import Fault, Planted

SEEDS = range(1, 9)
PASSES = ("softmax", "softmax backward", "rms_norm", "rms_norm backward", "cross_entropy")
ROWS = {"rms_norm backward": 5, "cross_entropy": 1}
COLS, PARTIALS = 17000, 2
SOFTMAX, RMS_NORM, CROSS_ENTROPY = ("softmax.cu", "rms_norm.cu", "cross_entropy.cu")


def barriers(kernels: tuple[str, ...], file: str) -> list[Fault]:
    """One of those at a block's start is missing, in each of the kernels."""
    return [
        Fault(f"no {name}", (kernel,), file, f"{name}();", f"if (!ON) {name}();", i)
        for i, kernel in enumerate(kernels)
        for name in ("cluster_started", "cluster_wait")
    ]


FAULTS = [
    *barriers(PASSES[:2], SOFTMAX),
    *barriers(PASSES[2:4], RMS_NORM),
    *barriers(PASSES[4:], CROSS_ENTROPY),
    Fault("no arrival", PASSES, "reduce.h", "cluster_arrive();", "if (!ON) cluster_arrive();"),
    Fault("no wait", PASSES, "reduce.h", "cluster_wait();", "if (!ON) cluster_wait();"),
    Fault("the next slot", PASSES, "reduce.h", "&of[k][slot]", "&of[k][slot + ON]"),
    Fault("one slot for all blocks", PASSES, "reduce.h", "cluster_rank() * warps", "cluster_rank() * !ON * warps"),
    Fault("the first block is not told", PASSES, "reduce.h", "lane < size)", "lane >= ON && lane < size)"),
    Fault("the next block is told", PASSES, "reduce.h", "values[k], lane)", "values[k], lane + ON)"),
    Fault("one warp is not read", PASSES, "reduce.h", "return {0, size * warps}", "return {ON, size * warps}"),
    Fault("sums of another shift", PASSES[4:], "exp_sum.h", "other.moved(shift)", "(ON ? other : other.moved(shift))"),
    Fault("blocks share columns", PASSES[:4], "row.h", "cluster_rank() * share", "cluster_rank() * (share - ON * V)"),
    Fault("columns of no block", PASSES[:4], "row.h", "first + share", "first + share - ON * V"),
    Fault("blocks share columns", PASSES[4:], CROSS_ENTROPY, "cluster_rank() * a.share",
          "cluster_rank() * (a.share - ON * V)"),
    Fault("columns of no block", PASSES[4:], CROSS_ENTROPY, "min(begin + a.share,", "min(begin + a.share - ON * V,"),
    Fault("one buffer", PASSES[3:4], RMS_NORM, "turn ^= 1", "turn ^= !ON"),
    Fault("rows of no cluster", PASSES[3:4], RMS_NORM, "gridDim.x / cluster_size()", "gridDim.x / cluster_size() + ON"),
    Fault("sums begin as they are", PASSES[3:4], RMS_NORM, "if (a.dweight) dweight.clear()",
          "if (a.dweight && !ON) dweight.clear()"),
]  # fmt: skip
CASES = [(number, kernel) for number, fault in enumerate(FAULTS, 1) for kernel in fault.kernels]


class Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("x", "dy", "weight", "rstd", "target", "out", "each", "dweight", "workspace")
    ]


class Kernels(Planted):
    """The kernels with their faults, on the same inputs every time."""

    def __init__(self) -> None:
        arguments = [ctypes.c_int, ctypes.c_int, Tensors, *[ctypes.c_int64] * 3]
        super().__init__("planted_rows", FAULTS, (SOFTMAX, RMS_NORM, CROSS_ENTROPY), arguments)
        torch.manual_seed(0)
        rows = max(ROWS.values())
        self.given = {
            "x": 3 * torch.randn(rows, COLS),
            "dy": torch.randn(rows, COLS),
            "weight": torch.randn(COLS),
            "rstd": torch.rand(rows),
            "target": torch.randint(COLS, (rows,)),
        }
        self.right = {kernel: self.call(kernel, 0, 0) for kernel in PASSES}

    def call(self, kernel: str, fault: int, seed: int) -> list[torch.Tensor] | str:
        """The kernel's results, or the error's message."""
        rows = ROWS.get(kernel, 2)
        written = {"out": torch.zeros(rows, COLS), "each": torch.zeros(rows), "dweight": torch.zeros(COLS)}
        spare = {"workspace": torch.zeros(PARTIALS, COLS)}
        pointers = Tensors(**{name: t.data_ptr() for name, t in (self.given | written | spare).items()})
        self.library.simt_set_seed(seed)
        error = self.library.run(PASSES.index(kernel), fault, pointers, rows, COLS, PARTIALS)
        self.library.simt_set_seed(0)
        return error.decode() if error else list(written.values())


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


@pytest.mark.parametrize("kernel", PASSES)
def test_without_a_fault_every_order_gives_the_same(kernels, kernel):
    assert not any(kernels.shows(kernel, 0, seed) for seed in SEEDS)
    assert all(not t.isnan().any() for t in kernels.right[kernel])


@pytest.mark.parametrize(("number", "kernel"), CASES, ids=[f"{k}, {FAULTS[n - 1].what}" for n, k in CASES])
def test_each_fault_shows(kernels, number, kernel):
    assert any(kernels.shows(kernel, number, seed) for seed in SEEDS)
