"""The native module ``fastllm.kernels._C`` and what its functions are told about tensors."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch  # before _C, so that both share torch's OpenMP threads

try:
    from . import _C
except ImportError as error:
    _C = None
    _MISSING = (
        f"the native module fastllm.kernels._C can't be loaded ({error}); "
        "reinstall fastllm where a C++ compiler is found (pip install -v -e . shows the build)"
    )

# backend -> its functions; both have the same names and arguments
KERNELS: dict[str, ModuleType] = {b: getattr(_C, b) for b in ("cpu", "cuda") if hasattr(_C, b)}

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def cpu_missing() -> str | None:
    """Why the CPU kernels can't be called, or None."""
    return None if "cpu" in KERNELS else _MISSING


# Of ONEDNN_MAX_CPU_ISA: those that lack instructions for products of bfloat16.
_NO_BFLOAT16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and PyTorch, by oneDNN, uses them."""
    limits = (os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL"))
    if next((limit for limit in limits if limit), "").lower() in _NO_BFLOAT16:
        return False
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private functions of PyTorch: with care
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def cuda_missing(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels can't be called on tensors of ``device``, or None."""
    if device.type != "cuda":
        return f"serves CUDA tensors, these are on {device}"
    if _C is None:
        return _MISSING
    if "cuda" not in KERNELS:
        return "fastllm was installed without nvcc, so it holds no CUDA C++ kernels"
    if torch.version.hip:
        return "serves NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def place(x: torch.Tensor) -> tuple[int, int]:
    """(device index, stream) of a launch: the last two arguments of every native function."""
    if x.device.type == "cuda":
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    return 0, 0


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


Rows = tuple[int, int, int, int]


def as_rows(x: torch.Tensor | None) -> tuple[torch.Tensor | None, Rows]:
    """The rows (last dimension) of ``x``, addressed in place: ``(x, (data, inner, outer_stride, inner_stride))``.

    Row ``r`` starts ``(r // inner) * outer_stride + (r % inner) * inner_stride`` elements after ``data``
    (csrc/tensor.h): enough for heads cut out of a fused projection. The ``x`` that comes back must be kept
    alive; it is a copy only where the last dimension is not contiguous or the rows need three strides.
    """
    if x is None:
        return None, (0, 1, 0, 0)
    if x.is_contiguous():
        return x, (x.data_ptr(), 1, x.shape[-1], 0)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        levels: list[list[int]] = []  # [size, stride], outermost first
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if levels and levels[-1][1] == size * stride:
                levels[-1] = [levels[-1][0] * size, stride]
            else:
                levels.append([size, stride])
        if not levels:
            return x, (x.data_ptr(), 1, 0, 0)
        if len(levels) == 1:
            return x, (x.data_ptr(), 1, levels[0][1], 0)
        if len(levels) == 2:
            return x, (x.data_ptr(), levels[1][0], levels[0][1], levels[1][1])
    return as_rows(x.contiguous())
