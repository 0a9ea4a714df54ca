"""``flash_decode``: attention of a few queries to a key/value cache."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import backends, checks
from . import reference
from .op import check_heads, too_wide
from .operators import attention_decode
from .options import Options, Window, bounds


# fmt: off
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: Literal[True], backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | None = None, *, causal: bool = True,
    scale: float | None = None, window: Window = None, softcap: float = 0.0, sinks: Tensor | None = None,
    return_lse: bool = False, backend: str | None = None,
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
        causal, scale, window, softcap, sinks, return_lse: as in :func:`flash_attention`.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        ``[batch, seq_q, heads, head_dim of v_cache]`` in the dtype of q; with return_lse ``(out, lse)``, lse
        ``[batch, heads, seq_q]`` float32.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, a tensor that needs
            a gradient, or a ``backend`` that can't run this call.
    """
    q, k_cache, v_cache = check_heads("flash_decode", q, k_cache, v_cache, ("k_cache", "v_cache"), 4)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("flash_decode", "scale", scale)
    options = Options(scale, *bounds("flash_decode", causal, window), checks.softcap("flash_decode", softcap))
    if cache_seqlens is not None:
        checks.indices("flash_decode", "cache_seqlens", cache_seqlens, "q", q)
        checks.sized("flash_decode", "cache_seqlens", cache_seqlens, (q.shape[0],))
    if sinks is not None:
        checks.parameter("flash_decode", "sinks", sinks, "q", q, (q.shape[-2],))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, sinks)):
        raise ValueError(
            "flash_decode: it has no gradient, and an argument requires one; call it under torch.no_grad(), or "
            "flash_attention, which has"
        )
    chosen = backends.select("flash_decode", q, backend, too_wide(q, v_cache))
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    if chosen == "torch":
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
        )
    else:
        sinks = None if sinks is None else sinks.float()
        out, lse = attention_decode(q, k_cache, v_cache, cache_seqlens, sinks, options, return_lse, chosen)
    return (out, lse) if return_lse and lse is not None else out  # there is one where it was asked for
