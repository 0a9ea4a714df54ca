"""Other libraries' kernels, where they are installed and there is a GPU: each as a call like PyTorch's.

Looked for without importing them; imported when a case is built.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .timing import DEVICE

Ops = dict[str, Callable[..., Tensor]]


def _there(package: str) -> bool:
    return DEVICE.type == "cuda" and importlib.util.find_spec(package) is not None


def _lazy(module: str, name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)


def rms_norm() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        call = _lazy("liger_kernel.transformers.functional", "liger_rms_norm")
        ops["liger"] = lambda x, w: call(x, w, 1e-6)
    if _there("quack"):
        norm = _lazy("quack", "rmsnorm")
        ops["quack"] = lambda x, w: norm(x, w, eps=1e-6)
    return ops


def softmax() -> Ops:
    return {"quack": _lazy("quack", "softmax")} if _there("quack") else {}


def cross_entropy() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        ops["liger"] = _lazy("liger_kernel.transformers.functional", "liger_cross_entropy")
    if _there("quack"):
        loss = _lazy("quack", "cross_entropy")
        ops["quack"] = lambda logits, target: loss(logits, target).mean()
    return ops


def linear_cross_entropy() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        call = _lazy("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        ops["liger"] = lambda hidden, weight, target: call(hidden, weight, target)
    if _there("cut_cross_entropy"):
        ops["cut-cross-entropy"] = _lazy("cut_cross_entropy", "linear_cross_entropy")
    return ops


def swiglu() -> Ops:
    return {"liger": _lazy("liger_kernel.transformers.functional", "liger_swiglu")} if _there("liger_kernel") else {}


def attention() -> Ops:
    if not _there("flash_attn"):
        return {}
    call = _lazy("flash_attn", "flash_attn_func")
    return {"flash-attn": lambda q, k, v: call(q, k, v, causal=True)}
