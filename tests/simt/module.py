"""The native module with its CUDA C++ kernels compiled for the emulator, and no others."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from .build import REPOSITORY, build

NAME = "_C_simt"


def load() -> ModuleType:
    csrc = REPOSITORY / "csrc"
    path = build(
        [csrc / "bindings.cpp", *sorted((csrc / "cuda").glob("*.cu"))],
        NAME,
        flags=["-DFASTLLM_CUDA", "-DFASTLLM_NO_CPU", f"-DFASTLLM_MODULE_NAME={NAME}", '-DFASTLLM_CUDA_ARCHS="emulated"'],
        include=[csrc],
        python_module=True,
    )
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
