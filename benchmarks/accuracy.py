"""The numerics report: each backend's error against float64, beside PyTorch's own in the same dtype.

PyTorch is what a model without our kernels would call. The verdict is the project's rule: at each element an error of
at most twice PyTorch's largest, plus one rounding step of the dtype, and one of float32, in which sums are made, at the
largest value. Inputs are random, of odd sizes, so that no kernel has it easy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import (
    backends,
    cross_entropy,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
    rms_norm,
    rope,
    softmax,
    swiglu,
)

from . import norm
from .attention import sdpa
from .cases import short
from .losses import eager_head, eager_jsd, eager_log_prob
from .pointwise import eager_rope, eager_swiglu
from .record import Error
from .runner import one_line
from .timing import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFUSED = "can't run this call: "  # backends.select, of a dtype that an op's kernels don't take
FLOAT32 = torch.finfo(torch.float32).eps
Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Probe:
    """An op, what PyTorch has in its place, and inputs in float32. ``call`` is the op with arguments of its own.

    ``terms``: where a result is a small difference of large terms, how large they are.
    """

    op: Op
    eager: Op
    call: Op
    inputs: dict[str, Tensor]
    backward: bool = True
    terms: float = 0.0


def measure(only: tuple[str, ...] = ()) -> Iterator[Error]:
    """Of each op, or of those named ``only``. A call that fails is an error without a number; what a backend does not
    take is left out, with the reason."""
    for probe in _probes():
        op = backends.OPS[probe.op.__name__]
        for dtype in DTYPES if not only or op.name in only else ():
            inputs = [t.to(DEVICE, dtype) for t in probe.inputs.values()]
            exact, eager = (results(probe, f, inputs, wide) for f, wide in (
                (lambda *a, p=probe: p.call(*a, backend="torch"), torch.float64), (probe.eager, None)
            ))  # fmt: skip
            for backend in ("torch", *(b for b in op.kernels if _runs(b, dtype))):
                named = op.name, short(dtype), backend
                try:
                    ours = results(probe, lambda *a, p=probe, b=backend: p.call(*a, backend=b), inputs)
                except Exception as error:
                    refused = str(error).partition(REFUSED)[2]
                    yield Error(*named, refused or one_line(error), None, None, None if refused else False)
                    continue
                yield from (Error(*named, name, *compare(ours[name], eager[name], exact[name])) for name in exact)


def _runs(backend: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter does, where it is asked for; bfloat16 it multiplies as integers."""
    imitated = backend == "triton" and backends.TRITON_INTERPRET and dtype == torch.bfloat16
    return not imitated and not backends.device_limit(backend, DEVICE)


def compare(ours: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> tuple[float, float, bool]:
    """Largest errors, and whether ours is within the rule."""
    error, pytorch = (ours.double() - exact).abs(), float((eager.double() - exact).abs().max())
    bound = 2 * pytorch + torch.finfo(ours.dtype).eps * exact.abs()
    within = error <= bound + FLOAT32 * max(terms, float(exact.abs().max()))
    return float(error.max()), pytorch, bool(within.all())


def results(probe: Probe, f: Op, inputs: list[Tensor], wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of ``f`` and gradients of its inputs, by name; computed in ``wide``, if given."""
    leaves = [t.to(wide or t.dtype).detach().requires_grad_(probe.backward) for t in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    named = {f"output {n}" if len(out) > 1 else "output": o.detach() for n, o in enumerate(out)}
    if not probe.backward:
        return named
    draw = torch.Generator().manual_seed(1)  # the same for each implementation, and rounded to the inputs' dtype
    grads = [torch.randn(o.shape, generator=draw).to(DEVICE, inputs[0].dtype).to(o.dtype) for o in out]
    torch.autograd.backward(out, grads)
    return named | {f"d{name}": t.grad for name, t in zip(probe.inputs, leaves, strict=True)}


def _probes() -> Iterator[Probe]:
    torch.manual_seed(0)
    normal = torch.randn
    target, angle = torch.randint(1003, (97,)).to(DEVICE), normal(65, 32)
    cos, sin = (t.to(DEVICE) for t in (angle.cos(), angle.sin()))

    def turned(q: Tensor, k: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return rope(q, k, cos.to(wide), sin.to(wide), **options)

    def eager_turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return eager_rope(q, k, *(t.to(q.dtype).repeat(1, 2).unsqueeze(1) for t in (cos, sin)))

    rows = {"x": normal(97, 1003)}
    logits = {"logits": 3 * normal(97, 1003)}
    head = {"hidden": normal(97, 65), "weight": 0.3 * normal(1003, 65)}
    heads = {"q": normal(2, 129, 6, 64), "k": normal(2, 129, 2, 64), "v": normal(2, 129, 2, 64)}
    turns = {"q": normal(2, 65, 6, 64), "k": normal(2, 65, 2, 64)}
    latest = {"q": normal(2, 1, 6, 64), "k": heads["k"], "v": heads["v"]}

    yield Probe(rms_norm, norm.eager, rms_norm, rows | {"weight": normal(1003)})
    yield Probe(softmax, lambda x: torch.softmax(x, -1), softmax, {"x": logits["logits"]})
    yield Probe(
        cross_entropy, lambda x: F.cross_entropy(x, target), lambda x, **o: cross_entropy(x, target, **o), logits
    )
    yield Probe(
        linear_cross_entropy, lambda h, w: eager_head(h, w, target),
        lambda h, w, **o: linear_cross_entropy(h, w, target, **o), head,
    )  # fmt: skip
    yield Probe(
        linear_log_prob, lambda h, w: eager_log_prob(h, w, target),
        lambda h, w, **o: linear_log_prob(h, w, target, **o), head,
    )  # fmt: skip
    taught = normal(97, 33).to(DEVICE), (0.3 * normal(1003, 33)).to(DEVICE)
    yield Probe(
        linear_jsd, lambda h, w: eager_jsd(h, w, *(t.to(h.dtype) for t in taught)),
        lambda h, w, **o: linear_jsd(h, w, *(t.to(h.dtype) for t in taught), **o), head,
    )  # fmt: skip
    yield Probe(flash_attention, lambda *a: sdpa(*a, is_causal=True, enable_gqa=True), flash_attention, heads)
    yield Probe(flash_decode, lambda *a: sdpa(*a, enable_gqa=True), flash_decode, latest, backward=False)
    yield Probe(rope, eager_turned, turned, turns)
    yield Probe(swiglu, eager_swiglu, swiglu, {"gate": rows["x"], "up": normal(97, 1003)})
