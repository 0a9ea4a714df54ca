"""What is measured: a case is one call of an op on one size, in several implementations that share its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastllm.kernels import backends

from .timing import DEVICE

ON_GPU = DEVICE.type == "cuda"
# Backends with kernels that run here at a speed worth timing: Triton's interpreter is no such.
KERNELS = tuple(
    b
    for b in ("triton", "cuda", "cpu")
    if not backends.device_limit(b, DEVICE) and not (b == "triton" and backends.TRITON_INTERPRET)
)
PYTORCH, COMPILED, COPY, PRODUCTS, OURS = "PyTorch", "torch.compile", "copy", "products", "fastllm"
LADDER, DROP_IN = "training step", "drop-in"

Call = Callable[[], Any]
Unit = Literal["GB/s", "TFLOP/s", "tokens/s"]
PER_UNIT: dict[Unit, float] = {"GB/s": 1e9, "TFLOP/s": 1e12, "tokens/s": 1.0}


@dataclass(frozen=True)
class Case:
    """One size of one op. ``build`` makes the inputs and a call for each of ``implementations``."""

    op: str
    size: str
    direction: str  # "forward", "forward+backward", "step"
    dtype: str
    work: float  # the least that must be done: bytes moved, floating-point operations, or tokens
    unit: Unit
    implementations: tuple[str, ...]
    build: Callable[[], dict[str, Call]] = field(repr=False, compare=False)
    sweep: str = ""  # the curve that this is a point of, by what varies: "tokens", "classes", "columns"
    at: int = 0

    @property
    def title(self) -> str:
        return f"{self.op} {self.direction} {self.size} {self.dtype}"


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    quick: bool = False
    seconds: float = 4.0  # for each case, beside its compilation

    def pick(self, gpu: Any, cpu: Any, quick: Any) -> Any:
        return quick if self.quick else gpu if ON_GPU else cpu

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """On a GPU the one that models are trained in."""
        return (torch.bfloat16,) if self.quick or ON_GPU else (torch.bfloat16, torch.float32)

    @property
    def directions(self) -> tuple[bool, ...]:
        """Whether backward too."""
        return (True,) if self.quick else (False, True)


def is_ours(implementation: str) -> bool:
    return OURS in implementation


def is_theirs(implementation: str) -> bool:
    """Not ours, and does the whole of the work."""
    return not is_ours(implementation) and implementation not in (COPY, PRODUCTS)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours(op: Callable, *, kernels: tuple[str, ...] = KERNELS, **options: Any) -> dict[str, Callable]:
    """``op`` on each backend that has a kernel for it here, by the implementation's name."""
    has = backends.OPS[op.__name__].kernels
    return {f"{OURS} {b}": partial(op, backend=b, **options) for b in kernels if b in has}


def baselines(eager: Callable, *, compiled: bool = True) -> dict[str, Callable]:
    return {PYTORCH: eager} | ({COMPILED: torch.compile(eager)} if compiled else {})


def step_of(op: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None) -> Call:
    """Forward, and with ``grad`` backward to all ``inputs``."""
    if grad is None:
        leaves = [t.detach() for t in inputs]
        return lambda: op(*leaves)
    leaves = [t.detach().requires_grad_() for t in inputs]

    def call() -> None:
        for t in leaves:
            t.grad = None
        out = op(*leaves)
        out.backward(grad.view_as(out))

    return call
