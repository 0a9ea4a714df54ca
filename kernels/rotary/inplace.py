"""What may be turned in place: nothing is written before all of it has been checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..library import has_values


def check_inplace(q: Tensor, k: Tensor) -> None:
    """Raise RuntimeError where PyTorch changes no such tensor, ValueError where an element would be turned twice."""
    if not has_values() or not all(_has_memory(x) for x in (q, k)):
        return
    check_apart("rope", q=q, k=k)
    shared = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    if shared and not _side_by_side(q, k) and _share_an_address(q, k):
        raise ValueError("rope: q and k share memory, which inplace would turn twice; pass k.clone()")
    for x in (q, k):
        if x.is_inference() or not changes_alone(x):
            x.narrow(-1, 0, 0).zero_()  # changes nothing, and raises what PyTorch raises of such a tensor


def check_apart(op: str, **written: Tensor) -> None:
    """Raise ValueError where an element would be written twice."""
    for name, x in written.items():
        if not has_values() or not _has_memory(x) or x.is_contiguous() or _steps_over_itself(x):
            continue
        if _share_an_address(x):
            raise ValueError(
                f"{op}: elements of {name} share memory, which would be written twice; pass {name}.clone()"
            )


def changes_alone(*tensors: Tensor) -> bool:
    """Whether a kernel may write first, and autograd be told afterwards: no leaf and no view of what it follows.

    ``Tensor.copy_`` does both for such.
    """
    return not torch.is_grad_enabled() or not any(
        (x.is_leaf and x.requires_grad) or (x._base is not None and x._base.requires_grad) for x in tensors
    )


def _has_memory(x: Tensor) -> bool:
    """No subclass that computes in its own way, and not without an element or an address."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type != "meta" and x.numel() > 0


def _extent(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))


def _steps_over_itself(x: Tensor) -> bool:
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


def _share_an_address(*tensors: Tensor) -> bool:
    """Whether two elements have one address, by a list of all: for rare layouts."""
    start = min(x.storage_offset() for x in tensors)
    count = max(x.storage_offset() - start + _extent(x.shape, x.stride()) for x in tensors)
    places = torch.arange(int(count), device="cpu")
    listed = [places.as_strided(x.shape, x.stride(), x.storage_offset() - start).flatten() for x in tensors]
    every = torch.cat(listed)
    return every.unique().numel() < every.numel()
