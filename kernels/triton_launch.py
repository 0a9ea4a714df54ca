"""What Triton kernels share: where rows are, tanh, the tile of a launch, its device, how many programs fill that."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

LOOP_COLS = 4096  # columns that a program reads at a time of a row too long for one tile
TILE = 1024  # elements of a tile of short rows

_processors: dict[torch.device, int] = {}


def row_strides(**tensors: torch.Tensor | None) -> dict[str, int]:
    """Where the rows of tensors from native.as_rows are: for ``x`` the keywords x_inner, x_outer and x_step."""
    found = {}
    for name, x in tensors.items():
        inner, outer, step = 1, 0, 0
        if x is not None and x.is_contiguous():
            outer = x.shape[-1]
        elif x is not None:
            inner, (outer, step, _) = x.shape[1], x.stride()
        found |= {f"{name}_inner": inner, f"{name}_outer": outer, f"{name}_step": step}
    return found


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Elements before a row; the rest is what row_strides gives."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """PRECISE: to float32's accuracy, by Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    if PRECISE:
        z = x * x
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
        y = tl.where(z < 0.390625, x + x * z * p, tl.where(x < 0, -far, far))
    else:
        y = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)
    return y


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
