"""``flash_attention``: the public function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from . import reference


@backends.op()
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(q kᵀ · scale) v``, causal unless told otherwise.

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, float32, float16 or bfloat16.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; heads must be a multiple of kv_heads (GQA, MQA).
        causal: a query sees no later key; the last query stands at the last key (bottom-right aligned).
            A query that sees no key gives 0.
        scale: multiplies the scores; None is ``head_dim ** -0.5``.
        window: a query sees the ``window`` latest keys, itself included.
        softcap: c > 0 replaces each scaled score s by ``c·tanh(s/c)``.
        sinks: ``[heads]``, a logit per head that adds to the softmax's sum and has no value.
        cu_seqlens_q, cu_seqlens_k: ``[documents + 1]`` int32 or int64, where documents start and end in
            packed tokens; q, k, v then have no batch dimension, and documents don't see each other.
            cu_seqlens_k defaults to cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: the longest document, a hint that saves a host synchronisation.
        return_lse: also return the scores' log-sum-exp, ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``).
        deterministic: the same gradients, bit for bit, at every call.
        backend: see ``explain``.

    Returns:
        ``[batch, seq_q, heads, head_dim]`` in the dtype of q; with return_lse ``(out, lse)``.

    The torch backend calls PyTorch's ``scaled_dot_product_attention`` for what that can express.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device.
    """
    packed = cu_seqlens_q is not None
    dims, layout = (3, "[tokens, heads, head_dim]") if packed else (4, "[batch, seq, heads, head_dim]")
    checks.floating("flash_attention", "q", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.tensor("flash_attention", name, t)
        if t.dim() != dims:
            raise ValueError(f"flash_attention: {name} must be {layout}, it has shape {list(t.shape)}")
    checks.like("flash_attention", "k", k, "q", q, shape=(*q.shape[: dims - 3], k.shape[-3], k.shape[-2], q.shape[-1]))
    checks.like("flash_attention", "v", v, "k", k)
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"flash_attention: the heads of q ({q.shape[-2]}) must be a multiple of those of k and v ({k.shape[-2]})"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"flash_attention: window ({window}) must be at least 1, with causal=True")
    if sinks is not None:
        checks.parameter("flash_attention", "sinks", sinks, "q", q, (q.shape[-2],))
    if not packed and cu_seqlens_k is not None:
        raise ValueError("flash_attention: cu_seqlens_k was given without cu_seqlens_q")
    if packed:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        checks.indices("flash_attention", "cu_seqlens_q", cu_seqlens_q, "q", q)
        checks.indices("flash_attention", "cu_seqlens_k", cu_seqlens_k, "q", q)
        checks.sized("flash_attention", "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    backends.select("flash_attention", q, backend)
    if not (packed or return_lse or softcap or window is not None or sinks is not None):
        return _sdpa(q, k, v, causal, scale)
    out, lse = reference.flash_attention(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, sinks=sinks,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    seq_q, seq_k = q.shape[1], k.shape[1]
    if causal and seq_q > seq_k:  # some queries see nothing: PyTorch would give NaN
        return reference.flash_attention(q, k, v, causal=True, scale=scale)[0]
    mask = None
    if causal and 1 < seq_q < seq_k:
        from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo, which takes a second

        mask = causal_lower_right(seq_q, seq_k)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=causal and seq_q == seq_k, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)
