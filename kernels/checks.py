"""Checks of arguments that the ops share: each names the argument, what came, and what was expected."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor

# Have the values of indices on a GPU checked too, which waits for the GPU at every call.
DEBUG = os.environ.get("FASTLLM_DEBUG", "0").lower() in ("1", "true", "on")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types that are no subclass with a way of its own


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floating(op: str, name: str, x: Any, *, min_dim: int = 1) -> None:
    """``x`` is a tensor of a floating-point dtype with at least ``min_dim`` dimensions."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
        tensor(op, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, not {short(x.dtype)}")
    if x.ndim < min_dim:
        raise ValueError(f"{op}: {name} must have at least {min_dim} dimension(s), it has {x.ndim}")


def tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{op}: {name} is a nested tensor; pass its values, and for attention cu_seqlens_q")
    if hasattr(x, "placements"):
        raise TypeError(
            f"{op}: {name} is a DTensor ({x.placements}); kernels take local tensors. With FSDP2, call the op in the "
            "forward of the module that fully_shard wraps, where parameters are whole; else pass .to_local() or "
            ".full_tensor(), whichever is meant"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, its layout is {x.layout}; call .to_dense() first")


def like(op: str, name: str, x: Any, other_name: str, other: Tensor, *, shape: tuple[int, ...] | None = None) -> None:
    """``x`` has the device and dtype of ``other``, and ``shape`` (default: that of ``other``)."""
    on(op, name, x, other_name, other)
    if x.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} is {short(x.dtype)} but {other_name} is {short(other.dtype)}; cast one to the other's dtype"
        )
    sized(op, name, x, other.shape if shape is None else shape)


def on(op: str, name: str, x: Any, other_name: str, other: Tensor) -> None:
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
        tensor(op, name, x)
    if x.device != other.device:
        raise ValueError(f"{op}: {name} is on {x.device} but {other_name} is on {other.device}; move one of them")


def sized(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, it has {list(x.shape)}")


def parameter(op: str, name: str, x: Any, other_name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor that is read in float32, whatever its dtype: on the device of ``other``."""
    on(op, name, x, other_name, other)
    if x.dtype != other.dtype:
        not_wider(op, name, x, other_name, other)
    sized(op, name, x, shape)


def not_wider(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` is floating, and float64 only where ``other`` is."""
    floating(op, name, x, min_dim=0)
    if x.dtype == torch.float64 != other.dtype:
        raise TypeError(
            f"{op}: {name} is float64 but {other_name} is {short(other.dtype)}; call {name}.float(), or make both so"
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` as torch.autocast gives them to a matrix product: all but float64 in its dtype, where it is on."""
    if not torch.compiler.is_dynamo_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in FLOATS and t.dtype != torch.float64 else t for t in tensors)


def indices(op: str, name: str, x: Any, other_name: str, other: Tensor) -> None:
    on(op, name, x, other_name, other)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, not {short(x.dtype)}")


def number(op: str, name: str, x: Any) -> float:
    """An option, which gets no gradient."""
    if type(x) is float:
        return x
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{op}: {name} gets no gradient; pass {name}.item(), or multiply the tensors by it yourself")
    if isinstance(x, int | float):
        return float(x)
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, not {x!r}") from None


def softcap(op: str, x: Any) -> float:
    if type(x) is float and x >= 0.0:
        return x
    cap = number(op, "softcap", x)
    if not cap >= 0.0:
        raise ValueError(f"{op}: softcap must be positive, or 0 for none, not {cap}")
    return cap


def integer(op: str, name: str, x: Any) -> int:
    if isinstance(x, torch.SymInt):
        return x
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, not {x!r}") from None
