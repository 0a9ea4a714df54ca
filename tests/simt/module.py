"""The native module with its CUDA C++ kernels compiled for the emulator, and no others.

``set_seed(n)`` shuffles the order in which threads and blocks run; 0 runs them in order.
"""

from __future__ import annotations

import ctypes
import importlib.util
from types import ModuleType

from .build import REPOSITORY, build

NAME = "_C_simt"


def load() -> ModuleType:
    csrc = REPOSITORY / "csrc"
    path = build(
        [csrc / "bindings.cpp", *sorted((csrc / "cuda").glob("*.cu"))],
        NAME,
        flags=[
            "-DFASTLLM_CUDA",
            "-DFASTLLM_NO_CPU",
            f"-DFASTLLM_MODULE_NAME={NAME}",
            '-DFASTLLM_CUDA_ARCHS="emulated"',
        ],
        include=[csrc],
        python_module=True,
    )
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_seed = ctypes.CDLL(str(path)).simt_set_seed
    module.set_seed.argtypes, module.set_seed.restype = [ctypes.c_uint64], None
    return module
