"""What devices can do: peak FLOP/s, memory, price."""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from .kernels.native import multiplies_bfloat16


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet, and the price of an hour."""

    name: str  # as PyTorch gives it
    memory: float  # bytes
    bandwidth: float  # bytes/s
    flops: float  # dense bfloat16, per second
    dollars: float  # an hour of one, on demand, in 2025; prices differ: see --dollars


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80 * 2**30, 2039e9, 312e12, 1.8),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, 3350e9, 989e12, 3.0),
    "h200": Gpu("NVIDIA H200", 141 * 2**30, 4800e9, 989e12, 3.5),
    "b200": Gpu("NVIDIA B200", 180 * 2**30, 8000e9, 2250e12, 5.0),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products: the data sheet's for bfloat16 on a known GPU, else measured, which takes a moment."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if gpu.name == name:
                return gpu.flops
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def this_machine() -> Gpu:
    """The device that training would use here, measured; its hour costs nothing."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, name, memory = torch.device("cuda", 0), properties.name, float(properties.total_memory)
    else:
        device, name = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
        memory = float(host_memory())
    dtype = torch.bfloat16 if device.type == "cuda" or multiplies_bfloat16() else torch.float32
    return Gpu(name, memory, math.nan, peak_flops(device, dtype), 0.0)


def host_memory() -> int:
    """Bytes of memory of this machine, without its GPUs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on a GPU those of PyTorch, on a CPU all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
