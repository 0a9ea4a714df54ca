"""``rope``: the public function, its autograd Function and its operators."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import backends, checks
from ..library import function, in_torch_func, launchers, operator
from ..native import as_rows
from . import reference


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
    checks.parameter("rope", "cos", cos, "q", q, tuple(cos.shape))
    checks.parameter("rope", "sin", sin, "q", q, tuple(cos.shape))
    if inplace:
        _check_inplace(q, k)
    if positions is not None:
        checks.indices("rope", "positions", positions, "q", q)
        checks.sized("rope", "positions", positions, tuple(q.shape[:-2]))
    elif cos.shape[0] < q.shape[-3]:
        raise ValueError(f"rope: cos and sin hold {cos.shape[0]} positions, q has {q.shape[-3]}")

    def why_not(backend: str) -> str | None:
        return "its kernel gives cos and sin no gradient" if cos.requires_grad or sin.requires_grad else None

    chosen = backends.select("rope", q, backend, why_not)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        turned = reference.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
    elif inplace and _changes_alone(q, k) and not (torch.compiler.is_compiling() or in_torch_func()):
        return tuple(_rope(x, cos, sin, positions, interleaved, False, True, chosen) for x in (q, k))
    else:
        turned = tuple(_rope(x, cos, sin, positions, interleaved, False, False, chosen) for x in (q, k))
    return (q.copy_(turned[0]), k.copy_(turned[1])) if inplace else turned


def _changes_alone(*tensors: Tensor) -> bool:
    """Whether a kernel may write first, and autograd be told afterwards: no view of what it follows.

    On such a view ``Tensor.copy_`` does both, and refuses before it writes.
    """
    return not torch.is_grad_enabled() or all(x._base is None or not x._base.requires_grad for x in tensors)


def _check_inplace(q: Tensor, k: Tensor) -> None:
    """Raise where autograd allows no change, or an element would be turned twice: before anything is written."""
    if torch.compiler.is_compiling() or in_torch_func():  # no addresses to be had
        return
    for name, x in (("q", q), ("k", k)):
        base = x if x._base is None else x._base
        if torch.is_grad_enabled() and base.is_leaf and base.requires_grad:
            view = "" if base is x else "a view of "
            raise RuntimeError(f"rope: {name} is {view}a leaf Variable that requires grad, which inplace can't change")
        if not _dense_steps(x) and _same_address(x):
            raise ValueError(
                f"rope: elements of {name} share memory, which inplace would turn twice; pass {name}.clone()"
            )
    shared = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    if shared and not _side_by_side(q, k) and _same_address(q, k):
        raise ValueError("rope: q and k share memory, which inplace would turn twice; pass k.clone()")


def _extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))


def _dense_steps(x: Tensor) -> bool:
    """Whether each dimension steps over all that is inside it."""
    reach = 0
    for step, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1 and step <= reach:
            return False
        reach += (n - 1) * step
    return True


def _side_by_side(q: Tensor, k: Tensor) -> bool:
    """Whether the heads of a token lie side by side, as in a fused projection."""
    if q.stride()[:-2] != k.stride()[:-2]:
        return False
    token = min((step for step, n in zip(q.stride()[:-2], q.shape, strict=False) if n > 1), default=None)
    first, second = sorted((q, k), key=Tensor.storage_offset)
    gap = second.storage_offset() - first.storage_offset()
    inner, last = (_extent(x.shape[-2:], x.stride()[-2:]) for x in (first, second))
    return gap >= inner and (token is None or gap + last <= token)


def _same_address(*tensors: Tensor) -> bool:
    """Whether two elements have one address, by a list of all: for rare layouts."""
    start = min(x.storage_offset() for x in tensors)
    count = max(x.storage_offset() - start + _extent(x.shape, x.stride()) for x in tensors if x.numel())
    places = torch.arange(int(count))
    listed = [places.as_strided(x.shape, x.stride(), x.storage_offset() - start).flatten() for x in tensors]
    every = torch.cat(listed)
    return every.unique().numel() < every.numel()


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
    return x.new_empty(x.shape)


@operator(launch=_launch_inplace, mutates="x")
def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool, backend: str
) -> None:
    """Rotates x itself."""
