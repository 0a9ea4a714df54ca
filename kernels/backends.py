"""Which implementation of an op runs: what exists here, the choice, and the reasons for it.

Four backends. ``cuda``: CUDA C++ kernels in the native module. ``triton``: Triton kernels. ``cpu``: C++
kernels in the native module. ``torch``: plain PyTorch, the specification of each op, always available.

One rule chooses, in :func:`select`:

1. the call's ``backend=`` argument: that backend, or an error that says why it can't run;
2. else :func:`use_backend` or the environment variable ``FASTLLM_BACKEND``: that backend for the ops and
   tensors that it can serve, the automatic choice for the others;
3. else automatically: the native kernels on a CPU; on a GPU Triton, or CUDA C++ where a measurement on
   that kind of GPU says so (:data:`MEASURED_FASTER`); PyTorch where no kernel can serve: other dtypes and devices,
   forward-mode differentiation, ``torch.func.vmap``, ``torch.func.grad`` of ``torch.func.grad``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from . import native
from .library import in_torch_func
from .measured import MEASURED_FASTER

BACKENDS = ("cuda", "triton", "cpu", "torch")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

WhyNot = Callable[[str], "str | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """An op of this library: its public function and the backends that have a kernel for it."""

    name: str
    kernels: tuple[str, ...]
    function: Callable[..., Any] = field(repr=False)
    tensor_cores: bool = False  # what its CUDA C++ kernels run on: not every dtype and GPU


OPS: dict[str, Op] = {}


def op(*kernels: str, tensor_cores: bool = False) -> Callable[[Function], Function]:
    """Enter a public function in :data:`OPS`, with the backends (beside ``torch``) that it has kernels for."""

    def enter(function: Function) -> Function:
        OPS[function.__name__] = Op(function.__name__, kernels, function, tensor_cores)
        return function

    return enter


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    return name


# What the process prefers; use_backend goes before it.
_DEFAULT: str | None = None
if os.environ.get("FASTLLM_BACKEND"):
    _DEFAULT = _checked(os.environ["FASTLLM_BACKEND"], "environment variable FASTLLM_BACKEND")

_preference: ContextVar[str | None] = ContextVar("fastllm_backend")


class _Context:
    """Reads the preference of this thread or task in the one way that torch.compile can trace.

    Dynamo refuses ``ContextVar.get``, but reads a property of a C function as it is, and guards on what it finds.
    Nothing set gives the object itself: ``ContextVar.get(default)`` is called with it.
    """

    preference = property(_preference.get)


_context = _Context()
# A block of use_backend inside a compiled function: written and read while Dynamo traces it, never at run time.
_traced: str | _Context | None = _context


def _preferred() -> str | None:
    found: Any = _traced if torch.compiler.is_dynamo_compiling() else _context
    if found is _context:
        found = _context.preference
    return _DEFAULT if found is _context else found


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Prefer backend ``name`` inside the block (``None``: the automatic choice).

    Ops and tensors that it can't serve take the automatic choice; :func:`explain` tells which and why.
    The preference belongs to this thread or asyncio task (and to the tasks it starts). A new thread starts with that
    of the process, ``FASTLLM_BACKEND``. A backward pass uses the backend of its forward, in whatever thread it runs.
    """
    global _traced
    if name is not None:
        _checked(name, "use_backend")
    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return
    token = _preference.set(name)
    try:
        yield
    finally:
        _preference.reset(token)


def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install triton)"
    return None


TRITON_MISSING = _triton_missing()
# Triton's interpreter runs kernels on CPU tensors. Triton reads the variable once, at import.
TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def device_limit(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` can't run on tensors of ``device``, or None."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"serves CPU tensors, these are on {device}"
        return native.cpu_missing()
    if backend == "cuda":
        return native.cuda_missing(device)
    if backend == "triton":
        if TRITON_MISSING:
            return TRITON_MISSING
        if device.type == "cpu" and not TRITON_INTERPRET:
            return "serves GPU tensors, these are on the CPU (TRITON_INTERPRET=1 runs its interpreter)"
        if device.type not in ("cpu", "cuda", "xpu"):
            return f"does not serve {device.type} tensors"
    return None


def transformed() -> str | None:
    """Why no kernel can serve inside the transforms of torch.func and forward-mode differentiation that are on."""
    if forward_ad._current_level >= 0:
        return "its kernels have no forward-mode derivative"
    if in_torch_func():
        levels = torch._C._functorch.get_interpreter_stack() or []
        if any(level.key() != torch._C._functorch.TransformType.Grad for level in levels):
            return "its kernels take no part in vmap and the like"
        if len(levels) > 1:
            return "its kernels differentiate once"
    return None


# torch.compile asks while it traces, when the same transforms are on; it guards on them by itself. What
# torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _limit(op: Op, backend: str, x: torch.Tensor, why_not: WhyNot | None) -> str | None:
    if backend == "torch":
        return None
    limit = transformed() or _limit_of_kind(op, backend, x.dtype, x.device)
    return limit or (None if why_not is None else why_not(backend))


def _limit_of_kind(op: Op, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if backend not in op.kernels:
        return f"{op.name} has no {backend} kernel yet"
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    limit = device_limit(backend, device)
    return native.tensor_cores_missing(dtype, device) if not limit and backend == "cuda" and op.tensor_cores else limit


def _automatic(op: Op, device: torch.device) -> tuple[str, ...]:
    """The backends to try, best first."""
    if device.type == "cpu":
        return ("cpu", "torch")  # Triton's interpreter is a debugger: on request only
    best = _measured(op, device)
    return (
        ("triton", "cuda", "torch") if best is None else (best, *(b for b in ("triton", "cuda", "torch") if b != best))
    )


def _measured(op: Op, device: torch.device) -> str | None:
    """The backend that was measured to be the fastest for ``op`` on the kind of ``device``."""
    if device.type != "cuda" or all(name != op.name for name, _ in MEASURED_FASTER):
        return None
    return MEASURED_FASTER.get((op.name, torch.cuda.get_device_name(device)))


def select(name: str, x: torch.Tensor, backend: str | None, why_not: WhyNot | None = None) -> str | Any:
    """The backend that runs op ``name`` on ``x`` (see the module's docstring for the rule).

    ``why_not(backend)`` gives the op's own reason, beyond device and dtype, why this call is beyond a
    backend's kernel. Raises ValueError where ``backend`` was asked for and can't run. Under :func:`explain` it
    is an Explanation, which the op returns at once.
    """
    op = OPS[name]
    if backend is not None:
        if isinstance(backend, _Question):
            return _explain(op, x, backend.backend, why_not)
        reason = _limit(op, _checked(backend, f"{name}: backend"), x, why_not)
        if reason:
            raise ValueError(f"{name}: backend {backend!r} can't run this call: {reason}")
        return backend
    preferred = _preferred()
    if preferred is not None and not _limit(op, preferred, x, why_not):
        return preferred
    if transformed() is None:
        found = _find_kernels if torch.compiler.is_dynamo_compiling() else _found_kernels
        for candidate in found(name, x.dtype, x.device):
            if why_not is None or not why_not(candidate):
                return candidate
    return "torch"


def _find_kernels(name: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """The backends that have a kernel for such tensors, best first."""
    op = OPS[name]
    order = _automatic(op, device)
    if "cpu" in order and native.cpu_missing() and dtype in KERNEL_DTYPES:
        native.warn_of_missing()
    return tuple(b for b in order if b != "torch" and not _limit_of_kind(op, b, dtype, device))


# torch.compile asks while it traces, as for `transformed`: nothing that the answer depends on changes.
_find_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
_found_kernels = functools.cache(_find_kernels)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the backend chosen, and for each backend what speaks for or against it."""

    op: str
    chosen: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  {'*' if b == self.chosen else ' '} {b:<7} {r}" for b, r in self.reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Question:
    """Takes the place of a call's ``backend`` to ask :func:`select` for an Explanation."""

    backend: str | None


def _explain(op: Op, x: torch.Tensor, backend: str | None, why_not: WhyNot | None) -> Explanation:
    limits = {b: _limit(op, b, x, why_not) for b in BACKENDS}
    order = _automatic(op, x.device)
    automatic = next(b for b in order if not limits[b])
    if backend is not None:
        chosen, why = _checked(backend, f"{op.name}: backend"), "chosen: asked for in the call"
    elif (preferred := _preferred()) is not None and not limits[preferred]:
        chosen, why = preferred, "chosen: preferred by use_backend or FASTLLM_BACKEND"
    else:
        measured = automatic == _measured(op, x.device)
        chosen, why = automatic, "chosen: measured to be the fastest here" if measured else "chosen automatically"
    reasons = {}
    for b in BACKENDS:
        if b == chosen:
            reasons[b] = f"asked for, but would raise: {limits[b]}" if limits[b] else why
        elif limits[b]:
            reasons[b] = f"no: {limits[b]}"
        elif b not in order:
            reasons[b] = "could run; on request only"
        else:
            reasons[b] = f"could run; {chosen} comes first"
    return Explanation(op.name, chosen, reasons)


def explain(op: str | Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Tell, for this call on this machine, which backend would run and why not the others.

    ``op`` is a public function or its name; the arguments are those of the call, which is checked like
    the call itself but not run. Print the result, or read ``.chosen`` and ``.reasons``.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"explain: unknown op {name!r}; choose one of {', '.join(sorted(OPS))}")
    return OPS[name].function(*args, **kwargs, backend=_Question(backend))
