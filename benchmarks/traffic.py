"""What the CUDA C++ kernels that work on rows read and write, for each byte that they must: an account, without a GPU.

python -m benchmarks.traffic prints the table of csrc/cuda/README.md, in a checkout.

The kernels run in the emulator (tests/simt), which counts what they load and store of each tensor and says which
launches they make, on a GPU with thread-block clusters and on one without. Blocks of a multiprocessor come from the
table of compiled kernels (aot.json). A kernel that reads a row twice gets it from L2 if L2 holds the rows of all blocks
that run at once, and otherwise from memory. What another kernel reads again comes from memory.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import aot
from .machine_code import short_names

# An H100: multiprocessors, and bytes of L2.
PROCESSORS, L2 = 132, 50e6
TARGET = "sm_90a"
WIDTHS = (4096, 16384, 32768, 65536, 131072, 262144)
DTYPES = (torch.bfloat16, torch.float32)
CLUSTERS, NO_CLUSTERS = 0, 2  # devices of the emulator
ROWS = 2


class Pass(NamedTuple):
    """A direction of an op on rows of ``cols``: its call on a device, and the tensors that it must read and write."""

    call: Callable[[int], object]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Launched(NamedTuple):
    kernel: str
    threads: int
    blocks: int  # of the grid
    cluster: int


class Counted(NamedTuple):
    """Times that each input was read, and each output written, and the launches."""

    reads: dict[str, float]
    writes: dict[str, float]
    launches: list[Launched]


def softmax(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    x, y = (torch.randn(ROWS, cols).to(dtype) for _ in range(2))
    return Pass(lambda device: cuda.softmax_forward(x, None, 0, 1.0, False, y, device, 0), {"x": x}, {"y": y})


def softmax_backward(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    dy, y, dx = (torch.randn(ROWS, cols).to(dtype) for _ in range(3))
    return Pass(lambda device: cuda.softmax_backward(dy, y, 1.0, False, dx, device, 0), {"dy": dy, "y": y}, {"dx": dx})


def rms_norm(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    x, y = (torch.randn(ROWS, cols).to(dtype) for _ in range(2))
    weight, rstd = torch.ones(cols, dtype=dtype), torch.empty(ROWS)

    def call(device: int) -> None:
        cuda.rms_norm_forward(x, weight, None, 1e-6, 0.0, y, None, rstd, device, 0)

    return Pass(call, {"x": x}, {"y": y})


def rms_norm_backward(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    dy, x, dx = (torch.randn(ROWS, cols).to(dtype) for _ in range(3))
    weight, dweight, rstd = torch.ones(cols, dtype=dtype), torch.empty(cols, dtype=dtype), torch.ones(ROWS)

    def call(device: int) -> None:
        workspace = torch.empty(cuda.rms_norm_partials(x, device), cols)
        cuda.rms_norm_backward(dy, x, weight, rstd, None, 0.0, dx, dweight, workspace, device, 0)

    return Pass(call, {"dy": dy, "x": x}, {"dx": dx})


def _losses(cols: int) -> tuple[Tensor, ...]:
    return torch.zeros(ROWS, dtype=torch.int64), *torch.ones(2, ROWS)


def cross_entropy(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    logits, (target, loss, lse) = torch.randn(ROWS, cols).to(dtype), _losses(cols)
    options = (-100, 0.0, 0.0, 0.0, 1.0, 0, cols)

    def call(device: int) -> None:
        cuda.cross_entropy_forward(logits, target, None, None, options, loss, lse, None, device, 0)

    return Pass(call, {"logits": logits}, {})


def cross_entropy_backward(cuda: ModuleType, cols: int, dtype: torch.dtype) -> Pass:
    logits, dlogits = (torch.randn(ROWS, cols).to(dtype) for _ in range(2))
    target, dloss, lse = _losses(cols)
    options = (-100, 0.0, 0.0, 0.0, 1.0, 0, cols)

    def call(device: int) -> None:
        cuda.cross_entropy_backward(
            logits, target, None, None, lse, dloss, None, None, None, options, dlogits, device, 0
        )

    return Pass(call, {"logits": logits}, {"dlogits": dlogits})


PASSES = {
    "softmax": softmax,
    "softmax backward": softmax_backward,
    "RMSNorm": rms_norm,
    "RMSNorm backward": rms_norm_backward,
    "cross-entropy": cross_entropy,
    "cross-entropy backward": cross_entropy_backward,
}
HOLDING = [name for name in PASSES if not name.startswith("cross-entropy")]  # rows in registers


@functools.cache
def emulator() -> tuple[ModuleType, ctypes.CDLL]:
    """The kernels, and the emulator's own functions."""
    from tests.simt.module import load

    module = load()
    library = ctypes.CDLL(module.__file__)
    library.simt_count.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.simt_counted.argtypes, library.simt_counted.restype = [ctypes.c_int, ctypes.c_bool], ctypes.c_uint64
    library.simt_launches.restype = ctypes.c_char_p
    return module.cuda, library


def count(name: str, cols: int, dtype: torch.dtype, device: int) -> Counted:
    """Run a pass on a device of the emulator."""
    cuda, library = emulator()
    made = PASSES[name](cuda, cols, dtype)
    tensors = made.inputs | made.outputs
    library.simt_record(True)
    ranges = {name: library.simt_count(t.data_ptr(), t.nbytes) for name, t in tensors.items()}
    try:
        made.call(device)
        launches = list(_launches(library.simt_launches().decode()))
        times = {
            (name, written): library.simt_counted(number, written) / tensors[name].nbytes
            for name, number in ranges.items()
            for written in (False, True)
        }
    finally:
        library.simt_record(False)
        library.simt_count_nothing()
    assert not any(times[name, True] for name in made.inputs) and not any(times[name, False] for name in made.outputs)
    return Counted({n: times[n, False] for n in made.inputs}, {n: times[n, True] for n in made.outputs}, launches)


def _launches(text: str) -> Iterator[Launched]:
    for line in text.splitlines():
        name, *numbers = line.split("\t")
        x, y, z, *block, cluster = map(int, numbers)
        name = name.removeprefix("void ").split("(")[0]
        (short,) = short_names([name])
        yield Launched(short, block[0] * block[1] * block[2], x * y * z, cluster)


def resident_blocks(kernel: str) -> int:
    """Blocks of a multiprocessor."""
    (table,) = json.loads(aot.TABLE.read_text())["cuda"].values()
    if kernel not in table:
        raise LookupError(f"{aot.TABLE.name} has no {kernel}: python -m benchmarks.aot --write")
    return table[kernel][TARGET]["blocks"]


def from_memory(counted: Counted, cols: int, dtype: torch.dtype) -> float:
    """Bytes of memory moved, for each that has to be."""
    main, needed = counted.launches[0], len(counted.reads) + len(counted.writes)
    passes = sum("columns" in launch.kernel for launch in counted.launches)  # other kernels that read the inputs
    again = sum(counted.reads.values()) - len(counted.reads) * (1 + passes)  # by the same kernel
    row = len(counted.reads) * cols * dtype.itemsize
    resident = PROCESSORS * resident_blocks(main.kernel) * row * ROWS / main.blocks
    moved = sum(counted.writes.values()) + len(counted.reads) * (1 + passes) + (again if resident > L2 else 0)
    return moved / needed


def main() -> None:
    rows: list[list[str]] = []
    for name in HOLDING:
        for dtype in DTYPES:
            cells = []
            for cols in WIDTHS:
                alone, together = (count(name, cols, dtype, device) for device in (NO_CLUSTERS, CLUSTERS))
                launch = together.launches[0]
                shape = f"{launch.cluster}×{resident_blocks(launch.kernel)}"
                cells.append(f"{from_memory(alone, cols, dtype):.2f} {from_memory(together, cols, dtype):.2f} {shape}")
            rows.append([name, str(dtype).removeprefix("torch."), *cells])
    head = ["", "columns", *(f"{cols:,}" for cols in WIDTHS)]
    for row in [head, ["---"] * len(head), *rows]:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
