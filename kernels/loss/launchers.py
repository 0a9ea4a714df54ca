"""Which module launches the kernels of a backend."""

from __future__ import annotations

from types import ModuleType

from . import native


def launchers(backend: str) -> ModuleType:
    if backend == "triton":
        from . import triton_kernels  # needs triton, which the other backends do without

        return triton_kernels
    return native
