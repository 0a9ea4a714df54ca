"""What Triton kernels share: where rows are, the tile of a launch, its device, how many programs fill that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it where a kernel is)

LOOP_COLS = 4096  # columns that a program reads at a time of a row too long for one tile
TILE = 1024  # elements of a tile of short rows

_processors: dict[torch.device, int] = {}


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Elements before a row; the strides are those of native.as_rows."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


def tile(cols: int, longest: int) -> dict[str, int]:
    """The tile of a launch: rows, columns, and warps for about 16 to 32 elements a thread."""
    block = triton.next_power_of_2(cols)
    if block > longest:
        return {"ROWS": 1, "COLS": LOOP_COLS, "num_warps": 8}
    rows = max(1, min(16, TILE // block))
    most = 16 if torch.version.hip is None else 8
    return {"ROWS": rows, "COLS": block, "num_warps": min(most, max(4, rows * block // 512))}


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Makes the device of ``x`` the current one: Triton launches there."""
    if x.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that tests reach the many-rows-per-program path."""
    if device.type == "cpu":
        return 2
    if device not in _processors:
        properties = torch.get_device_module(device).get_device_properties(device)
        _processors[device] = getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count
    return _processors[device]
