"""Other libraries' kernels, where they are installed and there is a GPU: each as a call like PyTorch's.

Looked for without importing them; imported when a case is built. "In place": gradients go over inputs, which costs
less memory and which not every model can bear.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .timing import DEVICE

Ops = dict[str, Callable[..., Tensor]]


def _there(package: str) -> bool:
    return DEVICE.type == "cuda" and importlib.util.find_spec(package) is not None


def _lazy(module: str, name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)


def _liger(name: str) -> Callable[..., Any]:
    return _lazy("liger_kernel.transformers.functional", name)


def rms_norm() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        call = _liger("liger_rms_norm")
        ops["liger"] = lambda x, w: call(x, w, 1e-6, in_place=False)  # else over dy, which the others share
    if _there("quack"):
        norm = _lazy("quack", "rmsnorm")
        ops["quack"] = lambda x, w: norm(x, w, eps=1e-6)
    return ops


def softmax() -> Ops:
    ops = {"liger": _liger("liger_softmax")} if _there("liger_kernel") else {}
    return ops | ({"quack": _lazy("quack", "softmax")} if _there("quack") else {})


def cross_entropy() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        ops["liger, in place"] = _liger("liger_cross_entropy")
    if _there("quack"):
        ops["quack"] = partial(_lazy("quack", "cross_entropy"), reduction="mean")
    return ops


def linear_cross_entropy() -> Ops:
    ops: Ops = {}
    if _there("liger_kernel"):
        ops["liger"] = _liger("liger_fused_linear_cross_entropy")
    if _there("cut_cross_entropy"):
        ops["cut-cross-entropy"] = _lazy("cut_cross_entropy", "linear_cross_entropy")
    return ops


def swiglu() -> Ops:
    return {"liger, in place": _liger("liger_swiglu")} if _there("liger_kernel") else {}


def attention() -> Ops:
    modules = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface"}
    return {n: partial(_lazy(m, "flash_attn_func"), causal=True) for n, m in modules.items() if _there(m)}
