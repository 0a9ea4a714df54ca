"""``rope_append``: rotary position embedding of a step's tokens, written straight into a paged key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks
from ..library import empty_like, has_values, launchers, operator
from . import reference
from .inplace import check_apart
from .op import check_positions
from .placement import Placement


@backends.op("triton", "cpu")
def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Turns queries and keys as :func:`rope` does, bit by bit, and writes keys and values into a cache of pages.

    Args:
        q: ``[tokens, heads, head_dim]``, float32, float16 or bfloat16; q, k and v may be cut out of one projection.
        k, v: ``[tokens, kv_heads, head_dim]`` in the dtype of q.
        cos, sin: ``[max_seq, rotary_dim / 2]``, as in :func:`rope`.
        positions: ``[tokens]`` int64 or int32, each token's row in cos and sin.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]`` in the dtype of q, the pools that
            :func:`flash_decode` reads by a block table; written in place.
        slots: ``[tokens]`` int64 or int32, ``page * page_size + offset``, where each token's key and value go: no two
            tokens to the same place. A token whose slot is negative (padding) is written nowhere.
        interleaved, backend: as in :func:`rope`.

    Returns:
        q turned: a new, contiguous tensor.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, a tensor that needs a
            gradient, a cache whose elements share memory, or a ``backend`` that can't run this call. IndexError: on a
            CPU, and before anything is written, a position outside the tables or a slot beyond the caches; on a GPU
            such a position gives NaN, and such a token is not written.
    """
    checks.floating("rope_append", "q", q)
    if q.dim() != 3:
        raise ValueError(f"rope_append: q must be [tokens, heads, head_dim], it has shape {list(q.shape)}")
    tokens, heads, dim = q.shape
    if heads == 0 or dim == 0:
        raise ValueError(f"rope_append: q must have a head, and features in it, it has shape {list(q.shape)}")
    checks.floating("rope_append", "k_cache", k_cache)
    if k_cache.dim() != 4:
        raise ValueError(
            f"rope_append: k_cache must be [pages, page_size, kv_heads, head_dim], it has shape {list(k_cache.shape)}"
        )
    pages, page_size, kv_heads, _ = k_cache.shape
    for name, x in (("k", k), ("v", v), ("v_cache", v_cache)):
        checks.floating("rope_append", name, x)
    cache, token = (pages, page_size, kv_heads, dim), (tokens, kv_heads, dim)
    if not (
        (k.dtype is v.dtype is k_cache.dtype is v_cache.dtype is q.dtype)
        and (k.device == v.device == k_cache.device == v_cache.device == q.device)
        and (k.shape == v.shape == token and k_cache.shape == v_cache.shape == cache)
    ):  # one of these says what is wrong
        for name, x, shape in (
            ("k_cache", k_cache, cache),
            ("v_cache", v_cache, cache),
            ("k", k, token),
            ("v", v, token),
        ):
            checks.like("rope_append", name, x, "q", q, shape=shape)
    checks.tensor("rope_append", "cos", cos)
    if cos.dim() != 2 or 2 * cos.shape[1] > dim:
        raise ValueError(
            f"rope_append: cos must be [max_seq, up to {dim // 2}] for a head_dim of {dim}, it has shape "
            f"{list(cos.shape)}"
        )
    checks.parameter("rope_append", "cos", cos, "q", q, cos.shape)
    checks.parameter("rope_append", "sin", sin, "q", q, cos.shape)
    for name, index in (("positions", positions), ("slots", slots)):
        checks.indices("rope_append", name, index, "q", q)
        checks.sized("rope_append", name, index, (tokens,))
    if torch.is_grad_enabled() and any([t.requires_grad for t in (q, k, v, cos, sin, k_cache, v_cache)]):  # noqa: C419 (a list takes half the time of a generator)
        raise ValueError(
            "rope_append: it has no gradient, and an argument requires one; call it under torch.no_grad(), or rope, "
            "which has"
        )
    chosen = backends.select("rope_append", q, backend)
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        check_apart("rope_append", k_cache=k_cache, v_cache=v_cache)
    if chosen == "torch":
        check_positions("rope_append", positions, cos.shape[0])
        _check_slots(slots, pages * page_size)
        return reference.rope_append(q, k, v, cos, sin, positions, k_cache, v_cache, slots, interleaved=interleaved)
    placement = Placement(cos.float(), sin.float(), positions.long(), slots.long())
    return rotate_append(q, k, v, placement, k_cache, v_cache, interleaved, chosen)


def _check_slots(slots: Tensor, held: int) -> None:
    """As the native kernels: on a CPU alone. Elsewhere the specification does not write such a token."""
    if slots.device.type == "cpu" and has_values() and (beyond := slots[slots >= held]).numel():
        raise IndexError(f"rope_append: slots holds {beyond[0].item()}, k_cache and v_cache hold {held} tokens")


def _launch(
    q: Tensor, k: Tensor, v: Tensor, placement: Placement, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> None:
    """With the last dimension of all contiguous, as the kernels want it."""
    interleaved, backend, out = rest
    dim = q.shape[-1]
    q, k, v, keys, values = [
        x if x.stride(-1) == 1 or dim == 1 else x.contiguous() for x in (q, k, v, k_cache, v_cache)
    ]
    launchers(__package__, backend).rotate_append(q, k, v, placement, keys, values, interleaved, backend, out)
    if keys is not k_cache:
        k_cache.copy_(keys)
    if values is not v_cache:
        v_cache.copy_(values)


@operator(strided="q k v", launch=_launch, mutates="k_cache v_cache")
def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    placement: Placement,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
    backend: str,
) -> Tensor:
    """q turned; k turned and v are written into the caches. ``placement``: float32 and int64."""
    return empty_like(q)
