"""What Triton kernels share: how they are compiled and launched, where rows are, tanh, the tile of a launch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .backends import TRITON_INTERPRET

LOOP_COLS = 4096  # columns that a program reads at a time of a row too long for one tile
TILE = 1024  # elements of a tile of short rows
INT32 = 2**31
HIP = torch.version.hip is not None

_processors: dict[torch.device, int] = {}


class Kernel:
    """A Triton kernel that is compiled for what its code depends on, and launched at little cost.

    Its parameters: tensors (upper case), numbers (lower case, the first one an integer), constants (constexpr). It is
    compiled once for the dtypes of the tensors, whether each begins at a multiple of 16 bytes, and the constants; on an
    AMD GPU also for whether each lies in less than 2 GiB, where Triton then counts bytes in 32 bits.
    Triton by itself also compiles for each pattern of numbers that are 1 or multiples of 16. Of those only strides
    matter, and only all together: see :func:`rows_at`.

    Triton's own launch binds arguments by name and looks at each of them, which takes tens of microseconds. Here it is
    asked at the first call of its kind alone, and the compiled kernel found by a short key from then on.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        numbers = [name for name in inspect.signature(function).parameters if name.islower()]
        self.jit = triton.jit(function, do_not_specialize=numbers)
        self.compiled: dict[Any, Any] = {}
        self.name = function.__name__.removesuffix("_kernel")

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        warps: int = 4,
        **options: int,
    ) -> None:
        """Launch on the device of the first tensor, on the current stream there. ``options``: Triton's num_stages."""
        first: Tensor = tensors[0]  # type: ignore[assignment]
        device = first.get_device()
        if device >= 0 and device != torch.accelerator.current_device_index():
            with torch.get_device_module(first.device).device(device):
                self(grid, tensors, numbers, constants, warps, **options)
            return
        seen = [None if x is None else (x.dtype, x.data_ptr() % 16 == 0, HIP and small(x)) for x in tensors]
        key = (device, warps, constants, *options.values(), *seen)
        compiled = self.compiled.get(key)
        wide = max(numbers) >= INT32  # Triton gives such a number 64 bits, and compiles for it by itself
        if compiled is None or wide or _hooked():
            compiled = self._by_triton(grid, False, tensors, numbers, constants, warps, options)
            if not (wide or TRITON_INTERPRET):
                self.compiled[key] = compiled
            return
        stream = driver.active.get_current_stream(device)
        no_hooks = None, None, None
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *tensors, *numbers, *constants
        )

    def compile(
        self,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        warps: int = 4,
        **options: int,
    ) -> Any:
        """Triton's compiled kernel for a launch, which is left out."""
        return self._by_triton(None, True, tensors, numbers, constants, warps, options)

    def _by_triton(
        self,
        grid: tuple[int, int, int] | None,
        warmup: bool,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[int, ...],
        warps: int,
        options: dict[str, int],
    ) -> Any:
        # Multiplications and additions become one instruction: from Triton 3.10 on only where it is asked for.
        options = {"num_warps": warps, "enable_fp_fusion": True, **options}
        return self.jit.run(*tensors, *numbers, *constants, grid=grid, warmup=warmup, **options)


def small(x: Tensor) -> bool:
    """Whether Triton counts its bytes in 32 bits, for AMD GPUs."""
    return x.untyped_storage().size() < INT32


def _hooked() -> bool:
    """Whether a profiler (Proton) wants Triton to tell it of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        return bool(enter.calls or leave.calls)
    except AttributeError:  # not Triton's chains of hooks, but what somebody has put in their place
        return True


def rows_at(*tensors: Tensor | None, sizes: tuple[int, ...] = ()) -> tuple[tuple[int, ...], bool, bool]:
    """Where the rows of tensors from native.as_rows are: the numbers inner, outer and step of each, and the constants
    ALIGNED and NESTED of all.

    ALIGNED: all strides and ``sizes`` are multiples of 8 elements, 16 bytes or more (but for booleans), which a thread
    then moves at once; :func:`multiple` tells the compiler. NESTED: the rows of a tensor need two strides, and
    :func:`row_offsets` a division.
    """
    numbers: list[int] = []
    bits, nested = 0, False
    for n in sizes:
        bits |= n
    for x in tensors:
        if x is None:
            numbers += (1, 0, 0)
        elif x.is_contiguous():
            cols = x.shape[-1]
            numbers += (1, cols, 0)
            bits |= cols
        else:
            outer, step, _ = x.stride()
            inner = x.shape[1]
            numbers += (inner, outer, step)
            bits |= outer | step
            nested = nested or inner > 1
    return tuple(numbers), bits % 8 == 0, nested


@triton.jit
def multiple(n, ALIGNED: tl.constexpr):
    """``n``, which the compiler takes for odd otherwise, and moves single elements."""
    if ALIGNED:
        n = (n >> 3) << 3
    return n


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride, ALIGNED: tl.constexpr, NESTED: tl.constexpr):
    """Elements before a row; the rest is what rows_at gives."""
    if NESTED:
        offsets = (row // inner) * multiple(outer_stride, ALIGNED) + (row % inner) * multiple(inner_stride, ALIGNED)
    else:
        offsets = row * multiple(outer_stride, ALIGNED)
    return offsets


@triton.jit
def tanh(x):
    """To float32's accuracy, by Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(z < 0.390625, x + x * z * p, tl.where(x < 0, -far, far))


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def tile(cols: int, longest: int) -> tuple[int, int, int]:
    """The tile of a launch: rows, columns, and warps for about 16 to 32 elements a thread."""
    block = power_of_two(cols)
    if block > longest:
        return 1, LOOP_COLS, 8
    rows = max(1, min(16, TILE // block))
    most = 16 if torch.version.hip is None else 8
    return rows, block, min(most, max(4, rows * block // 512))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that tests reach the many-rows-per-program path."""
    if device.type == "cpu":
        return 2
    if device not in _processors:
        properties = torch.get_device_module(device).get_device_properties(device)
        _processors[device] = getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count
    return _processors[device]
