"""A cycle account of the CUDA C++ attention kernels: what bounds them, and the TFLOP/s that follow, without a GPU.

python -m benchmarks.cycles prints the table of csrc/cuda/README.md.

A warp alternates between products, which want the tensor cores of its quarter of a multiprocessor, and the softmax,
which does not. While one warp is at its softmax, the others of the quarter have the tensor cores: the share of time in
which one of w warps wants them is that of a machine which w customers visit in turn (M/M/1 with w customers, Erlang's
and Palm's repairman model). Shared memory and L2 have a floor of their own. Figures are for long sequences without a
mask; causal ones lose the masked halves of the blocks on the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# What large products reach of the peak, as cuBLAS does: clocks fall under the load of tensor cores.
SUSTAINED = 0.85
# Cycles for which a warp waits in a step, for each barrier (the other warps) and first fragment of a product.
BARRIER, FRAGMENT = 40, 33
SHUFFLE = 30  # cycles until a shuffle's result is there
QUARTERS = 4  # of a multiprocessor


class Gpu(NamedTuple):
    name: str
    processors: int
    ghz: float
    multiply_adds: int  # of tensor cores in float32, a cycle and multiprocessor
    l2: float  # bytes a cycle and multiprocessor

    @property
    def peak(self) -> float:
        """TFLOP/s."""
        return 2 * self.multiply_adds * self.processors * self.ghz / 1e3


# Data sheets (RTX 5090: half rate with float32 sums). L2: the A100's is its data sheet's, the others are what reads of
# their chips reached elsewhere.
GPUS = (
    Gpu("A100", 108, 1.41, 1024, 47),
    Gpu("L40S", 142, 2.52, 512, 14),
    Gpu("RTX 5090", 170, 2.41, 256, 16),
)
MUFU, FLOAT, SHARED = 4, 16, 128  # results a cycle and quarter: exponentials, others; bytes of shared memory a cycle


class Kernel(NamedTuple):
    """A step of a warp: its rows meet ``columns`` in ``products`` products; ``scored`` of them give scores.

    ``rescales``: what share of the steps multiplies the sums by a factor.
    """

    name: str
    dim: int
    warps: int
    tiles: int  # of 16 rows
    columns: int
    blocks: int  # of a multiprocessor
    products: int
    scored: int
    barriers: int
    copied: int  # tiles of `columns` rows that a step copies
    rescales: float = 0.0

    def tensor(self, gpu: Gpu) -> float:
        """Cycles of a quarter's tensor cores."""
        multiply_adds = self.products * 16 * self.tiles * self.columns * self.dim
        return multiply_adds / (gpu.multiply_adds / QUARTERS)

    @property
    def reads(self) -> int:
        """Bytes of shared memory that a warp reads: fragments of two operands, or of one beside scores."""
        fragments = self.products * self.columns // 16 + self.scored * self.tiles
        return fragments * self.dim // 16 * 512

    @property
    def elsewhere(self) -> float:
        """Cycles of a warp without a product."""
        scores = 16 * self.tiles * self.columns / 32  # of a lane
        if self.name == "forward":
            row = 2 * SHUFFLE + 2 * self.tiles * 4 / FLOAT * 32  # the largest score, over four lanes
            plain = scores * 32 / FLOAT * (1 + 0.5)  # largest, rounding; the rest runs beside the exponentials
            plain += self.rescales * self.tiles * self.dim / 2 * 32 / FLOAT
        else:
            row, plain = 0.0, scores * 32 / FLOAT * (2 + 0.5 * (self.products - self.scored))
        return row + plain + scores * 32 / MUFU + self.barriers * BARRIER + self.products * FRAGMENT

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Of a multiprocessor, for one step of all its warps: each floor, and what comes of the first."""
        warps = self.warps * self.blocks
        tensor = self.tensor(gpu) * warps / QUARTERS
        customers, ratio = warps // QUARTERS, self.tensor(gpu) / self.elsewhere
        ways, total = 1.0, 1.0
        for i in range(customers):
            ways *= (customers - i) * ratio
            total += ways
        copied = self.copied * self.columns * self.dim * 2 * self.blocks
        return {
            "tensor": tensor,
            "exponentials": 16 * self.tiles * self.columns * warps / (MUFU * QUARTERS),
            "shared": (self.reads * warps + copied) / SHARED,
            "l2": copied / gpu.l2,
            "expected": tensor / (1 - 1 / total) / SUSTAINED,
        }

    def pairs(self) -> int:
        """Of a query and a key, in such a step."""
        return self.warps * self.blocks * 16 * self.tiles * self.columns


def forward(dim: int, warps: int, tiles: int, keys: int, blocks: int, rescales: float = 0.1) -> Kernel:
    return Kernel("forward", dim, warps, tiles, keys, blocks, 2, 1, 2, 2, rescales)


def dkdv(dim: int, warps: int, tiles: int, queries: int, blocks: int) -> Kernel:
    return Kernel("dk, dv", dim, warps, tiles, queries, blocks, 4, 2, 4, 2)


def dq(dim: int, warps: int, tiles: int, keys: int, blocks: int) -> Kernel:
    return Kernel("dq", dim, warps, tiles, keys, blocks, 3, 2, 3, 2)


# The anchor, of which Dao 2023 measured 190 to 225 TFLOP/s on an A100.
FLASH_ATTENTION_2 = forward(128, 4, 2, 64, 2, rescales=1.0)
# The shapes in csrc/cuda/attention_{forward,backward}.cu.
FORWARD = {64: forward(64, 4, 2, 64, 2), 128: forward(128, 4, 2, 32, 2), 256: forward(256, 8, 1, 32, 1)}
BACKWARD = {
    64: (dkdv(64, 4, 1, 64, 2), dq(64, 4, 2, 32, 2)),
    128: (dkdv(128, 8, 1, 32, 1), dq(128, 8, 1, 64, 1)),
}


def tflops(gpu: Gpu, kernels: Iterable[Kernel], useful: int) -> float:
    """Of kernels that go over the same pairs of query and key, of ``useful`` products in all."""
    kernels = tuple(kernels)
    bounds = [k.cycles(gpu) for k in kernels]
    cycles = sum(max(b["expected"], b["shared"], b["l2"]) / k.pairs() for k, b in zip(kernels, bounds, strict=True))
    return 2 * useful * kernels[0].dim / cycles * gpu.processors * gpu.ghz / 1e3


def main() -> None:
    rows: list[list[object]] = []
    for gpu in GPUS:
        kernels = [FLASH_ATTENTION_2, *FORWARD.values()] if gpu.name == "A100" else [*FORWARD.values()]
        for kernel in kernels:
            name = "FlashAttention-2 forward" if kernel is FLASH_ATTENTION_2 else "forward"
            rows.append([gpu.name, name, kernel.dim, *_bounds(gpu, kernel), f"{tflops(gpu, [kernel], 2):.0f}"])
        for pair in BACKWARD.values():
            for kernel in pair:
                rows.append([gpu.name, kernel.name, kernel.dim, *_bounds(gpu, kernel), ""])
            rows[-1][-1] = f"{tflops(gpu, pair, 5):.0f}"
    for row in [["GPU", "kernel", "D", "tensor", "exp", "shared", "L2", "expected", "TFLOP/s"], ["---"] * 9, *rows]:
        print("|", " | ".join(map(str, row)), "|")


def _bounds(gpu: Gpu, kernel: Kernel) -> list[str]:
    return [f"{value:.0f}" for value in kernel.cycles(gpu).values()]


if __name__ == "__main__":
    main()
