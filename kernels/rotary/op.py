"""``rope``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import backends, checks
from ..library import empty_like, function, has_values, launchers, operator
from ..native import as_rows
from . import reference
from .inplace import changes_alone, check_inplace


@backends.op("cuda", "triton", "cpu")
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864).

    Turns each pair of features by its position's angle. Where the tables have fewer than ``head_dim / 2``
    columns, the features after the first ``2 · columns`` pass unturned.

    Args:
        q: ``[..., seq, heads, head_dim]``, float32, float16 or bfloat16.
        k: ``[..., seq, kv_heads, head_dim]``; each of q and k keeps its dtype.
        cos, sin: ``[max_seq, rotary_dim / 2]``, of any of these dtypes, used in float32.
        interleaved: pairs are neighbours (GPT-J), not the two halves (GPT-NeoX, Llama).
        positions: ``[..., seq]`` int64 or int32, each token's row in the tables; None counts from 0. Packed
            documents count from 0 each.
        inplace: change q and k themselves, and return them. Their gradients are as ever.
        backend: see ``explain``.

    Returns:
        ``(q, k)`` turned: new, contiguous tensors of the same shapes and dtypes, or q and k themselves.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, or a
            ``backend`` that can't run this call; with inplace, elements of q or k that share memory. IndexError:
            on a CPU, a position outside the tables; on a GPU such a token becomes NaN. RuntimeError: with inplace, a
            leaf that requires a gradient, as PyTorch's own operations in place.
    """
    checks.floating("rope", "q", q, min_dim=3)
    checks.tensor("rope", "k", k)
    if k.dim() != q.dim():
        raise ValueError(f"rope: k must be laid out like q {list(q.shape)}, it has shape {list(k.shape)}")
    checks.on("rope", "k", k, "q", q)
    checks.not_wider("rope", "k", k, "q", q)
    checks.sized("rope", "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]))
    checks.tensor("rope", "cos", cos)
    if cos.dim() != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"rope: cos must be [max_seq, up to {q.shape[-1] // 2}] for a head_dim of {q.shape[-1]}, "
            f"it has shape {list(cos.shape)}"
        )
    checks.parameter("rope", "cos", cos, "q", q, cos.shape)
    checks.parameter("rope", "sin", sin, "q", q, cos.shape)
    if positions is not None:
        checks.indices("rope", "positions", positions, "q", q)
        checks.sized("rope", "positions", positions, q.shape[:-2])
    elif cos.shape[0] < q.shape[-3]:
        raise ValueError(f"rope: cos and sin hold {cos.shape[0]} positions, q has {q.shape[-3]}")

    def why_not(backend: str) -> str | None:
        return "its kernel gives cos and sin no gradient" if cos.requires_grad or sin.requires_grad else None

    chosen = backends.select("rope", q, backend, why_not)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if inplace:
        check_inplace(q, k)
    if chosen == "torch":
        if positions is not None:
            check_positions("rope", positions, cos.shape[0])
        turned = reference.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
    elif inplace and changes_alone(q, k) and has_values():
        return tuple(_rope(x, cos, sin, positions, interleaved, False, True, chosen) for x in (q, k))
    else:
        turned = tuple(_rope(x, cos, sin, positions, interleaved, False, False, chosen) for x in (q, k))
    return (q.copy_(turned[0]), k.copy_(turned[1])) if inplace else turned


def check_positions(op: str, positions: Tensor, rows: int) -> None:
    """As the native kernels: on a CPU alone. Elsewhere the specification gives NaN."""
    if positions.device.type != "cpu" or not has_values():
        return
    outside = (positions < 0) | (positions >= rows)
    if outside.any():
        raise IndexError(f"{op}: positions holds {positions[outside][0].item()}, cos and sin hold {rows} positions")


class _Rope(torch.autograd.Function):
    """A rotation; its backward is the rotation back, which can be differentiated like it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inverse: bool,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        arguments = (x, cos, sin, positions, interleaved, inverse, backend)
        if not inplace:
            return rotate(*arguments)
        rotate_(*arguments)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *tables, ctx.interleaved, ctx.inverse, inplace, ctx.backend = inputs
        ctx.save_for_backward(*tables)
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        dx = _rope(dx, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse, False, ctx.backend)
        return dx, None, None, None, None, None, None, None


_rope = function(_Rope)


def _launch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    backend: str,
    out: Tensor,
) -> None:
    cos, sin = cos.float(), sin.float()
    positions = None if positions is None else positions.long()
    launchers(__package__, backend).rotate(x, cos, sin, positions, interleaved, inverse, backend, out)


def _launch_inplace(x: Tensor, *rest: Any) -> None:
    if x.numel():
        in_place = cast(Tensor, as_rows(x)).data_ptr() == x.data_ptr()  # else its rows can't be addressed
        rows = x if in_place else x.contiguous()
        _launch(*(rows, *rest, rows))
        if rows is not x:
            x.copy_(rows)


@operator(strided="x", launch=_launch)
def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool, backend: str
) -> Tensor:
    return empty_like(x)


@operator(launch=_launch_inplace, mutates="x")
def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool, backend: str
) -> None:
    """Rotates x itself."""
