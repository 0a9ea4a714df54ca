"""``rope``: the public function, its autograd Function and its operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..library import register
from ..native import DTYPE_CODES, KERNELS, as_rows, place, pointer
from . import reference


@backends.op("cpu")
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864).

    Turns each pair of features by its position's angle. Where the tables have fewer than ``head_dim / 2``
    columns, the features after the first ``2 · columns`` pass unturned.

    Args:
        q: ``[..., seq, heads, head_dim]``, float32, float16 or bfloat16.
        k: ``[..., seq, kv_heads, head_dim]``, in the dtype of q.
        cos, sin: ``[max_seq, rotary_dim / 2]``, in the dtype of q or float32.
        interleaved: pairs are neighbours (GPT-J), not the two halves (GPT-NeoX, Llama).
        positions: ``[..., seq]`` int64 or int32, each token's row in the tables; None counts from 0.
        backend: see ``explain``.

    Returns:
        ``(q, k)`` turned: new tensors of the same shapes and dtype.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call. IndexError: on a CPU, a position outside the tables.
    """
    checks.floating("rope", "q", q, min_dim=3)
    checks.tensor("rope", "k", k)
    if k.dim() != q.dim():
        raise ValueError(f"rope: k must be laid out like q {list(q.shape)}, it has shape {list(k.shape)}")
    checks.like("rope", "k", k, "q", q, shape=(*q.shape[:-2], k.shape[-2], q.shape[-1]))
    checks.tensor("rope", "cos", cos)
    if cos.dim() != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"rope: cos must be [max_seq, up to {q.shape[-1] // 2}] for a head_dim of {q.shape[-1]}, "
            f"it has shape {list(cos.shape)}"
        )
    checks.parameter("rope", "cos", cos, "q", q, tuple(cos.shape))
    checks.parameter("rope", "sin", sin, "q", q, tuple(cos.shape))
    if positions is not None:
        checks.indices("rope", "positions", positions, "q", q)
        checks.sized("rope", "positions", positions, tuple(q.shape[:-2]))
    elif cos.shape[0] < q.shape[-3]:
        raise ValueError(f"rope: cos and sin hold {cos.shape[0]} positions, q has {q.shape[-3]}")

    def why_not(backend: str) -> str | None:
        if interleaved:
            return "its kernel turns halves, not interleaved pairs"
        return "its kernel gives cos and sin no gradient" if cos.requires_grad or sin.requires_grad else None

    chosen = backends.select("rope", q, backend, why_not)
    if chosen == "torch":
        return reference.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
    return _Rope.apply(q, k, cos, sin, positions, False, chosen)


class _Rope(torch.autograd.Function):
    """A rotation; its backward is the rotation back, which can be differentiated like it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        inverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse, ctx.backend = inverse, backend
        turn = torch.ops.fastllm.rope
        return turn(q, cos, sin, positions, inverse, backend), turn(k, cos, sin, positions, inverse, backend)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = _Rope.apply(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.backend)
        return dq, dk, None, None, None, None, None


@register(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool inverse, str backend) -> Tensor",
    fake=lambda x, cos, sin, positions, inverse, backend: x.new_empty(x.shape),
)
def _rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, backend: str) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x, x_rows = as_rows(x)
    cos, sin = (t.to(torch.float32).contiguous() for t in (cos, sin))
    positions = None if positions is None else positions.to(torch.int64).contiguous()
    (seq, heads, cols), (max_seq, half) = x.shape[-3:], cos.shape
    KERNELS[backend].rope(
        x_rows, cos.data_ptr(), sin.data_ptr(), pointer(positions), out.data_ptr(),
        x.numel() // cols, cols, heads, seq, half, max_seq, inverse, DTYPE_CODES[x.dtype], *place(x),
    )  # fmt: skip
    return out
