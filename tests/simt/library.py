"""The libraries of the self-tests' kernels: how they are built and called."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from .build import REPOSITORY, SIMT, build


def build_and_load(name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build([SIMT / f"{name}.cu"], name, include=[REPOSITORY / "csrc"])))
    library.simt_set_seed.argtypes = [ctypes.c_uint64]
    return library


def call(library: ctypes.CDLL, name: str, *arguments: Any) -> str | None:
    """The message of the error that the kernel ended with, or None. Tensors are passed as pointers."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
    return message.decode() if message is not None else None
