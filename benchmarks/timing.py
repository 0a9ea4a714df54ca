"""How a call is timed, and what machine it ran on."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Whose versions a result names, where they are there: those of peers.py and of steps.py.
OTHERS = ("transformers", "liger-kernel", "flash-attn", "quack-kernels", "cut-cross-entropy")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Cycles that the GPU is kept busy while the host enqueues a call, tried in turn: 0.1 to 50 ms at 2 GHz.
AHEAD = (2 * 10**5, 10**6, 10**7, 10**8)


class Clock:
    """A timer for pytest-benchmark that advances only while a call wrapped by :meth:`timed` runs.

    On a CPU by the wall clock. On a GPU by CUDA events, after the L2 cache has been overwritten, so that a
    call finds its inputs in memory as it would in a model.

    A kernel may be shorter than its dispatch. So the GPU first spins until the host has enqueued the whole call: the
    time between the events is the device's alone, and the host's is measured beside it (``host``). The spin takes
    any call, where a CUDA graph refuses those that synchronise, that allocate pinned memory or that a peer library
    launches elsewhere, and a graph would hide what a call costs the host. If the GPU has stopped spinning when the
    call returns, the spin was too short and the next length is tried. Where none is enough the call waits for the
    GPU itself, or has more launches than the driver queues (about a thousand): its time then includes what the GPU
    waits for the host inside the call, as in a model, and there is no time of the host's own.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.host: float | None = None  # seconds that the latest call took to enqueue
        self._flush = torch.empty(0)

    def __call__(self) -> float:
        return self.now

    def timed(self, call: Callable[[], Any]) -> Callable[[], None]:
        return _OnGpu(self, call) if DEVICE.type == "cuda" else lambda: self._cpu(call)

    def _cpu(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self.now += time.perf_counter() - start

    def overwrite_cache(self) -> None:
        if not self._flush.numel():
            cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            self._flush = torch.empty(4 * cache, dtype=torch.int8, device=DEVICE)
        self._flush.zero_()


class _OnGpu:
    """One call, with the shortest spin that is enough for it."""

    def __init__(self, clock: Clock, call: Callable[[], Any]) -> None:
        self.clock, self.call = clock, call
        self.spins, self.waits = list(AHEAD), False

    def __call__(self) -> None:
        while not self._measured():
            if len(self.spins) > 1:
                del self.spins[0]
            else:
                self.spins, self.waits = list(AHEAD), True  # no spin is long enough: the shortest will do

    def _measured(self) -> bool:
        """Whether the time counts: the host was ahead of the GPU, or can't be."""
        self.clock.overwrite_cache()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.spins[0])
        start.record()
        begun = time.perf_counter()
        self.call()
        host = time.perf_counter() - begun
        ahead = not start.query()
        end.record()
        torch.cuda.synchronize()
        if not (ahead or self.waits):
            return False
        self.clock.host = None if self.waits else host
        self.clock.now += start.elapsed_time(end) / 1e3
        return True


CLOCK = Clock()


def device_name() -> str:
    """The GPU's or the processor's name as a folder of benchmarks/results/ can bear it."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name(DEVICE)
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
        name = f"{model.group(1) if model else platform.machine()} {os.cpu_count()} cores"
    name = re.sub(r"\((R|TM)\)", "", name)
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def commit() -> str:
    """Of this checkout, or as FASTLLM_COMMIT has it: a copy of a checkout has no repository, or somebody else's."""
    if named := os.environ.get("FASTLLM_COMMIT"):
        return named
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamp() -> dict[str, str]:
    """What a result must say of where it comes from."""
    import triton

    found = {
        "device": device_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    for package in OTHERS:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if DEVICE.type == "cuda":
        found |= {
            "cuda": str(torch.version.cuda),
            "gpu": torch.cuda.get_device_name(DEVICE),
            "sms": str(torch.cuda.get_device_properties(DEVICE).multi_processor_count),
        }
    else:
        from fastllm.kernels import native

        found["cpu kernels"] = native.KERNELS["cpu"].instruction_set() if "cpu" in native.KERNELS else "none"
    return found


def extra_memory(call: Callable[[], Any]) -> int | None:
    """Bytes that ``call`` has allocated at its peak, beyond what was there before: None where that is not known.

    On a CPU it is resident memory, as Linux counts it.
    """
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be taken again unseen
        clear.write_text("5")  # the peak begins anew
    except (OSError, AttributeError):
        return None
    before = _status_bytes(status, "VmRSS")
    call()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
