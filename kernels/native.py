"""The native module ``fastllm.kernels._C`` and what its functions are told about tensors."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C, so that both share torch's OpenMP threads

INSTALL = (
    "install g++ or clang++, and then fastllm again: in its source folder `pip install -e .`, "
    "else `pip install --force-reinstall --no-deps --no-cache-dir fastllm-kernels`"
)


def _load() -> tuple[Any, str | None]:
    """The native module, or None and why there is none."""
    try:
        return importlib.import_module("._C", __package__), None
    except ImportError as error:
        others = sorted(path.name for path in Path(__file__).parent.glob("_C.*"))
        if not isinstance(error, ModuleNotFoundError):
            why = f"can't be loaded ({error})"
        elif others:
            why = f"was built for another Python ({', '.join(others)}); install fastllm again with this one"
        else:
            why = f"was not built, for want of a C++ compiler or because of FASTLLM_NATIVE=0; {INSTALL}"
        return None, f"the native module fastllm.kernels._C {why}"


_C, _MISSING = _load()

# backend -> its functions; both have the same names and arguments
KERNELS: dict[str, ModuleType] = {b: getattr(_C, b) for b in ("cpu", "cuda") if hasattr(_C, b)}


def recording() -> Any:
    """A recording of native launches (csrc/bindings.cpp), or None where there is no native module."""
    return None if _C is None else _C.Recording()


def release_threads() -> None:
    """End the threads that wait for the caller's next parallel region, PyTorch's too; then it gets new ones.

    For whoever hands the work over to another thread, which has threads of its own: where all such threads are more
    than the cores, GNU's OpenMP lets them wait asleep, and short kernels take twice as long.
    """
    if "cpu" in KERNELS:
        KERNELS["cpu"].release_threads()


def cpu_missing() -> str | None:
    """Why the CPU kernels can't be called, or None."""
    return None if "cpu" in KERNELS else _MISSING


_warned = False


def warn_of_missing() -> None:
    """Say once in a process that ops on a CPU run as plain PyTorch."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"fastllm: {_MISSING}. Until then ops on CPU tensors run as plain PyTorch, which is slower and takes more "
        "memory (`fastllm info` shows what this install has)",
        RuntimeWarning,
        stacklevel=5,  # _find_kernels, select, the op, its caller
    )


# torch.compile calls it while it traces (see backends.transformed).
warn_of_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        return "this install has no CUDA C++ kernels (install where nvcc and the GPU are, or set FASTLLM_CUDA_ARCHS)"
    if torch.version.hip:
        return "serves NVIDIA GPUs only"
    capability, archs = torch.cuda.get_device_capability(device), KERNELS["cuda"].archs
    if not runs_on(capability, archs):
        gpu = ".".join(map(str, capability))
        return f"its kernels are compiled for {archs}, this GPU has compute capability {gpu} (set FASTLLM_CUDA_ARCHS)"
    return None


def tensor_cores_missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why CUDA C++ kernels that run on tensor cores can't be called, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"its kernels take float16 and bfloat16, which tensor cores multiply, not {name}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether kernels compiled for ``archs`` ("80 90a") run on a GPU of this compute capability.

    Machine code runs on later minor versions too, except that of architectures with a letter. The newest architecture
    without one is there as PTX as well, which the driver compiles for anything newer.
    """
    major, minor = capability
    plain = [int(arch) for arch in archs.split() if arch.isdigit()]
    exact = [arch[:-1] for arch in archs.split() if not arch.isdigit()]
    same_major = any(arch // 10 == major and arch % 10 <= minor for arch in plain)
    return f"{major}{minor}" in exact or same_major or (bool(plain) and max(plain) <= 10 * major + minor)


def place(x: torch.Tensor) -> tuple[int, int]:
    """(device index, stream) of a launch: the last two arguments of every native function."""
    if x.is_cuda:
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    return 0, 0


def merged_dims(x: torch.Tensor) -> list[tuple[int, int]] | None:
    """``(size, stride)`` of the dimensions before the last, outermost first: as few as address the same rows.

    None where the last dimension is not contiguous.
    """
    shape, strides = x.shape, x.stride()
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    merged = []
    size, stride = 1, 0
    for n, step in zip(shape, strides[:-1], strict=False):
        if n == 1:
            continue
        if size > 1 and stride != n * step:
            merged.append((size, stride))
            size = 1
        size, stride = size * n, step
    if size > 1:
        merged.append((size, stride))
    return merged


def as_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` as kernels address its rows (last dimension): itself if contiguous, else a view ``[outer, inner, cols]``.

    Two strides are enough for heads cut out of a fused projection. It is a copy only where the last dimension is
    not contiguous or the rows need three strides.
    """
    if x is None or x.is_contiguous():
        return x
    dims = merged_dims(x)
    if dims is None or len(dims) > 2:
        return x.contiguous()
    (outer, outer_stride), (inner, inner_stride) = dims if len(dims) == 2 else (*dims, (1, 0))
    return x.as_strided((outer, inner, x.shape[-1]), (outer_stride, inner_stride, 1))
