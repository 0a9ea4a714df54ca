"""``flash_decode``: attention of a few queries to a key/value cache."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends, checks
from ..library import has_values
from . import reference
from .op import check_heads, too_wide
from .operators import attention_decode
from .options import Options, Window, bounds

SMALLEST_PAGE = 16  # a kernel's tile of keys lies in one page


# fmt: off
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: Literal[False] = False, block_table: Tensor | None = None, backend: str | None = None,
) -> Tensor: ...
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: Literal[True], block_table: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: bool = False, block_table: Tensor | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@backends.op("triton", "cuda", "cpu", tensor_cores=True)
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the latest queries to a key/value cache, causal unless told otherwise, without gradients.

    Reads each key and value once, for all heads that share it, and splits the keys over the processor's cores or
    multiprocessors, which one sequence then occupies ("Flash-Decoding", Dao et al. 2023).

    Args:
        q: ``[batch, seq_q, heads, head_dim]``: the latest tokens, one or a few (any number is right, a few are
            fast), float32, float16 or bfloat16.
        k_cache, v_cache: ``[batch, capacity, kv_heads, head_dim]``, those of the latest tokens included; heads must
            be a multiple of kv_heads. Any strides.
        cache_seqlens: ``[batch]`` int32 or int64, how many tokens the cache holds of each sequence, those of q
            included; None: all of them. What lies beyond is not looked at and may be NaN. A number outside
            0..capacity counts as the nearest in it.
        block_table: ``[batch, max_pages]`` int32 or int64. k_cache and v_cache are then pools ``[pages, page_size,
            kv_heads, head_dim]``, page_size a power of two of at least 16: key i of sequence b lies in page
            ``block_table[b, i // page_size]`` at ``i % page_size``. cache_seqlens is needed, and counts up to
            ``max_pages * page_size``. Entries of pages that no query sees are not looked at.
        causal, scale, window, softcap, sinks, return_lse: as in :func:`flash_attention`.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        ``[batch, seq_q, heads, head_dim of v_cache]`` in the dtype of q; with return_lse ``(out, lse)``, lse
        ``[batch, heads, seq_q]`` float32.

    A query's result depends on that query and the keys that it sees alone, bit by bit: not on the other queries and
    sequences, the capacity, or the number of threads. On a GPU that holds with a block_table.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, a tensor that needs
            a gradient, or a ``backend`` that can't run this call. IndexError: on a CPU, a page outside the pool that
            a query would see; on a GPU the sequence becomes NaN.
    """
    paged = block_table is not None
    q, k_cache, v_cache = check_heads("flash_decode", q, k_cache, v_cache, ("k_cache", "v_cache"), 4, paged)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("flash_decode", "scale", scale)
    options = Options(scale, *bounds("flash_decode", causal, window), checks.softcap("flash_decode", softcap))
    if cache_seqlens is not None:
        checks.indices("flash_decode", "cache_seqlens", cache_seqlens, "q", q)
        checks.sized("flash_decode", "cache_seqlens", cache_seqlens, (q.shape[0],))
    if block_table is not None:
        _check_pages(q, k_cache, cache_seqlens, block_table)
    if sinks is not None:
        checks.parameter("flash_decode", "sinks", sinks, "q", q, (q.shape[-2],))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, sinks)):
        raise ValueError(
            "flash_decode: it has no gradient, and an argument requires one; call it under torch.no_grad(), or "
            "flash_attention, which has"
        )
    chosen = backends.select("flash_decode", q, backend, _why_not(q, v_cache, paged))
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
        if block_table is not None and cache_seqlens is not None:  # which it goes with
            _check_pages_read(q, k_cache, cache_seqlens, block_table, options)
        out, lse = reference.flash_decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            causal=False,
            scale=options.scale,
            window=(options.left, options.right),
            softcap=options.softcap,
            sinks=sinks,
            block_table=block_table,
        )
    else:
        sinks = None if sinks is None else sinks.float()
        table = block_table
        if table is not None and table.dtype == torch.int64:  # what int32 doesn't hold stays outside the pool
            table = table.clamp(-1, torch.iinfo(torch.int32).max).int()
        out, lse = attention_decode(q, k_cache, v_cache, cache_seqlens, table, sinks, options, return_lse, chosen)
    return (out, lse) if return_lse and lse is not None else out  # there is one where it was asked for


def _why_not(q: Tensor, v: Tensor, paged: bool) -> backends.WhyNot | None:
    """For backends.select."""
    wide = too_wide(q, v)
    if not paged:
        return wide
    pages = "its kernel reads no pages (block_table)"
    return lambda backend: (wide(backend) if wide else None) or (pages if backend == "cuda" else None)


def _check_pages(q: Tensor, k_cache: Tensor, cache_seqlens: Tensor | None, block_table: Tensor) -> None:
    checks.indices("flash_decode", "block_table", block_table, "q", q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"flash_decode: block_table must be [batch, max_pages] for a batch of {q.shape[0]}, it has shape "
            f"{list(block_table.shape)}"
        )
    if cache_seqlens is None:
        raise ValueError("flash_decode: with block_table it needs cache_seqlens, how many tokens each sequence has")
    size = k_cache.shape[1]
    if size < SMALLEST_PAGE or size & (size - 1):
        raise ValueError(
            f"flash_decode: the page_size, dimension 1 of k_cache and v_cache, must be a power of two of at least "
            f"{SMALLEST_PAGE}, not {size}"
        )


def _check_pages_read(q: Tensor, k_cache: Tensor, seqlens: Tensor, block_table: Tensor, options: Options) -> None:
    """As the native kernels: on a CPU alone. Elsewhere the specification gives NaN."""
    if q.device.type != "cpu" or not has_values():
        return
    begin, end = reference.pages_read(seqlens, q.shape[1], options.left, k_cache.shape[1], block_table.shape[1])
    column = torch.arange(block_table.shape[1])
    read = (column >= begin.unsqueeze(1)) & (column < end.unsqueeze(1))
    outside = block_table[read & ((block_table < 0) | (block_table >= len(k_cache)))]
    if outside.numel():
        raise IndexError(
            f"flash_decode: block_table holds {outside[0].item()}, k_cache and v_cache hold {len(k_cache)} pages"
        )
