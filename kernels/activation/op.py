"""``swiglu``: the public function."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks
from . import reference


@backends.op()
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · up``, computed in float32 (Shazeer 2020, arXiv:2002.05202).

    Args:
        gate: any shape, float32, float16 or bfloat16.
        up: like gate.
        backend: see ``explain``.

    Returns:
        A tensor like gate.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device.
    """
    checks.floating("swiglu", "gate", gate, min_dim=0)
    checks.like("swiglu", "up", up, "gate", gate)
    backends.select("swiglu", gate, backend)
    return reference.swiglu(gate, up)
