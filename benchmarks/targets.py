"""Triton as it would run on a GPU that is not there: what it would compile, without a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90a": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@contextmanager
def current_target(name: str) -> Iterator[None]:
    """Triton takes a GPU of this kind for the current device. Kernels can be compiled then, not launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = list(TARGETS).index(name)  # Triton keeps what it has compiled by device
    known = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget(*TARGETS[name]),
    )
    before = driver._active
    driver.set_active(known)
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def specialized_attention(softcap: bool = False) -> Iterator[None]:
    """The warp-specialised kernels of attention are the defaults, where there are some."""
    from fastllm.kernels.attention import triton_tuning

    default = triton_tuning.default

    def choose(kernel: str, target: str, dim: int, *rest: Any) -> triton_tuning.Config:
        found = triton_tuning.specialized(kernel, target, dim, softcap)
        return found[0] if found else default(kernel, target, dim, *rest)

    with mock.patch.object(triton_tuning, "default", choose):
        yield


@contextmanager
def compiling_nothing() -> Iterator[list[JITFunction]]:
    """Triton goes through all that a launch does on the host, but compiles and launches nothing.

    Gives a list that each kernel enters when it would be compiled.
    """
    from triton.runtime.jit import JITFunction

    compiled: list[JITFunction] = []
    nothing = SimpleNamespace(function=0, packed_metadata=(), run=_nothing, launch_metadata=_nothing)

    def enter(kernel: JITFunction, key: str, signature: Any, device: int, *rest: Any) -> Any:
        compiled.append(kernel)
        kernel.device_caches[device][0][key] = nothing
        return nothing

    with mock.patch.object(JITFunction, "_do_compile", enter):
        yield compiled


def _nothing(*arguments: Any) -> None:
    """In place of what only a GPU can do."""
