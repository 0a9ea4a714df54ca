"""The rule for numerics (one for all ops): an error against float64 is measured by PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastllm.kernels.triton_launch import LOOP_COLS

Case = TypeVar("Case")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result", terms: Tensor | None = None
) -> None:
    """The error of ``actual`` is at most twice that of ``eager``, plus one rounding step of the dtype.

    ``exact`` is the same computation in float64. Errors are compared by their maximum over the tensor, so
    that an element on which eager happens to be right is not held against a kernel. At 0 the step is the dtype's
    smallest number (of float16 6e-8, which a result of 1e-7 can be away from). Where a result is a
    small difference of large terms, ``terms`` gives the sum of their magnitudes, and one rounding step of
    float32, in which they are added, is allowed on that.
    """
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.numel() == 0:
        return
    error, allowed = (actual.double() - exact).abs(), (eager.double() - exact).abs().max()
    dtype = torch.finfo(actual.dtype)
    bound = 2 * allowed + dtype.eps * exact.abs().clamp(min=dtype.smallest_normal)
    if terms is not None:
        bound = bound + torch.finfo(torch.float32).eps * terms
    worst = (error - bound).argmax()
    assert bool((error <= bound).all()), (
        f"{what}: error {error.flatten()[worst]:.3e} where {exact.flatten()[worst]:.3e} was expected; "
        f"PyTorch's own largest error is {allowed:.3e}"
    )


def on_gpus(cases: Sequence[Case], dtypes: Sequence[torch.dtype] = DTYPES) -> list[tuple[str, torch.dtype, Case]]:
    """(backend, dtype, case) for tests on a GPU: of CUDA C++ all, in its ``dtypes``; of Triton, which compiles each for
    a second, every case in one dtype, in turn."""
    found = [("cuda", dtype, case) for case in cases for dtype in dtypes]
    return found + [("triton", DTYPES[i % len(DTYPES)], case) for i, case in enumerate(cases)]


def long_row(backend: str, cols: int) -> int:
    """As many columns, or for Triton's interpreter, which takes a second for 100,000, no more than six steps' worth.

    From 16,385 on Triton's kernels go through a row in steps of 4096 columns: what is left for the last step stays the
    same, and so do the code and what each lane of it adds up first. Tests on a GPU have the full length.
    """
    return cols if backend != "triton" else min(cols, 5 * LOOP_COLS + cols % LOOP_COLS)


def with_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    cast: Callable[[Tensor], Tensor] = lambda t: t,
) -> list[Tensor]:
    """``call(*inputs)`` on fresh leaves, differentiated with ``grads``: outputs, then the gradients of inputs."""
    leaves = [None if t is None else cast(t.detach()).requires_grad_() for t in inputs]
    out = call(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [cast(g) for g in grads[: len(out)]])
    return [o.detach() for o in out] + [t.grad for t in leaves if t is not None]
