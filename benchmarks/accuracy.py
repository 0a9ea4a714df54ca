"""The numerics report: each backend's error against float64, beside PyTorch's own in the same dtype.

Largest absolute errors of an output or a gradient. PyTorch is what a model without our kernels would call. The verdict
is the project's rule: at most twice PyTorch's error, plus one rounding step of the dtype (and of float32, in which sums
are made) at the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import (
    backends,
    cross_entropy,
    flash_attention,
    linear_cross_entropy,
    rms_norm,
    rope,
    softmax,
    swiglu,
)

from .attention import sdpa
from .cases import KERNELS
from .losses import eager_head
from .pointwise import eager_rope, eager_swiglu
from .record import Error
from .timing import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def measure() -> Iterator[Error]:
    """Odd sizes, so that no kernel has it easy."""
    torch.manual_seed(0)
    normal = torch.randn
    target = torch.randint(1003, (97,))
    angle = normal(65, 32)
    cos, sin = (t.to(DEVICE) for t in (angle.cos(), angle.sin()))
    target = target.to(DEVICE)

    def tables(q: Tensor) -> list[Tensor]:
        return [t.to(q.dtype).repeat(1, 2).unsqueeze(1) for t in (cos, sin)]

    yield from _of(
        rms_norm, lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6), x=normal(97, 1003), weight=normal(1003)
    )
    yield from _of(softmax, lambda x: torch.softmax(x, -1), x=3 * normal(97, 1003))
    yield from _of(swiglu, eager_swiglu, gate=normal(97, 1003), up=normal(97, 1003))

    def turned(q: Tensor, k: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return rope(q, k, cos.to(wide), sin.to(wide), **options)

    q, k = normal(2, 65, 6, 64), normal(2, 65, 2, 64)
    yield from _of(rope, lambda q, k: eager_rope(q, k, *tables(q)), turned, q=q, k=k)
    yield from _of(
        flash_attention, lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        q=normal(2, 129, 6, 64), k=normal(2, 129, 2, 64), v=normal(2, 129, 2, 64),
    )  # fmt: skip
    yield from _of(
        cross_entropy, lambda x: F.cross_entropy(x, target), lambda x, **o: cross_entropy(x, target, **o),
        logits=3 * normal(97, 1003),
    )  # fmt: skip
    yield from _of(
        linear_cross_entropy, lambda hidden, weight: eager_head(hidden, weight, target),
        lambda hidden, weight, **o: linear_cross_entropy(hidden, weight, target, **o),
        hidden=normal(97, 65), weight=0.3 * normal(1003, 65),
    )  # fmt: skip


def _of(op: Callable, eager: Op, call: Op | None = None, **inputs: Tensor) -> Iterator[Error]:
    call = op if call is None else call
    for dtype in DTYPES:
        rounded = {name: t.to(DEVICE, dtype) for name, t in inputs.items()}
        first = eager(*rounded.values())
        grads = [torch.randn_like(o) if o.dim() else o.new_ones(()) for o in _several(first)]

        def results(f: Op, wide: torch.dtype | None = None) -> dict[str, Tensor]:
            leaves = [t.to(wide or t.dtype).detach().requires_grad_() for t in rounded.values()]  # noqa: B023
            out = _several(f(*leaves))
            torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])  # noqa: B023
            named = {f"output {n}" if len(out) > 1 else "output": o.detach() for n, o in enumerate(out)}
            return named | {f"d{name}": t.grad for name, t in zip(rounded, leaves, strict=True)}  # noqa: B023

        exact = results(lambda *a: call(*a, backend="torch"), torch.float64)
        theirs = results(eager)
        for backend in ("torch", *(b for b in KERNELS if b in backends.OPS[op.__name__].kernels)):
            ours = results(lambda *a, b=backend: call(*a, backend=b))
            for output, reference in exact.items():
                error, pytorch = (float((r[output].double() - reference).abs().max()) for r in (ours, theirs))
                largest = float(reference.abs().max())
                step = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps
                within = error <= 2 * pytorch + step * largest
                yield Error(op.__name__, str(dtype).removeprefix("torch."), backend, output, error, pytorch, within)


def _several(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
