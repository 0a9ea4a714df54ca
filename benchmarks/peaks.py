"""What this machine can do at all: the rates that a kernel's share is taken of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastllm.hardware import GPUS

from .cases import short
from .timing import CLOCK, DEVICE

# Data sheets: GB/s and dense bfloat16 TFLOP/s.
DATASHEET = {gpu.name: (gpu.bandwidth / 1e9, gpu.flops / 1e12) for gpu in GPUS.values()}


def measure(seconds: float = 1.0) -> dict[str, float]:
    """Copy bandwidth in GB/s, read and written, and matrix rates in TFLOP/s by dtype, each over ``seconds``."""
    on_gpu = DEVICE.type == "cuda"
    source = torch.ones(2**30 if on_gpu else 2**27, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / 1e9 / _median(partial(target.copy_, source), seconds)}
    n = 8192 if on_gpu else 1536
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
        found[short(dtype)] = 2 * n**3 / 1e12 / _median(partial(torch.mm, a, b), seconds)
    return found


def _median(call: Callable[[], Any], seconds: float) -> float:
    timed, times = CLOCK.timed(call), []
    timed()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        before = CLOCK()
        timed()
        times.append(CLOCK() - before)
    return statistics.median(times)
