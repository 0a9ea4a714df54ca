"""``flash_attention``: the public function and its autograd Function."""

from __future__ import annotations

import warnings
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks
from ..library import differentiable_once, differentiated, function, has_values
from . import reference
from .operators import attention_backward, attention_forward
from .options import UNBOUNDED, Options, Window, bounds
from .packing import UNPACKED, Packing, check_packing

LARGEST_HEAD = 256


# fmt: off
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: Window = None,
    softcap: float = 0.0, sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, layout: str = "bshd",
    backend: str | None = None,
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: Window = None,
    softcap: float = 0.0, sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    return_lse: Literal[True], deterministic: bool = False, layout: str = "bshd", backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: Window = None,
    softcap: float = 0.0, sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    return_lse: bool = False, deterministic: bool = False, layout: str = "bshd", backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@backends.op("triton", "cuda", "cpu", tensor_cores=True)
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    layout: str = "bshd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention of ``[batch, seq, heads, head_dim]``, causal unless told otherwise.

    ``softmax(q kᵀ · scale) v``. ``F.scaled_dot_product_attention`` has heads before seq and is not causal by default:
    its tensors go in with ``layout="bhsd"``.

    Never holds the scores: memory is linear in the sequence length (Dao et al. 2022, arXiv:2205.14135; Dao 2023,
    arXiv:2307.08691).

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, float32, float16 or bfloat16; any strides, so q, k and v may be
            cut out of one projection: they are read in place where the last dimension is contiguous.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; heads must be a multiple of kv_heads (GQA, MQA). The head_dim
            of v may be another (multi-head latent attention).
        causal: a query sees no later key; the last query stands at the last key (bottom-right aligned).
            A query that sees no key gives 0.
        scale: multiplies the scores; None is ``head_dim ** -0.5``.
        window: a query sees the ``window`` latest keys, that at its own position included. ``(left, right)``, as
            FlashAttention's window_size: as many keys before its own position and after it; None or -1 is no bound.
        softcap: c > 0 replaces each scaled score s by ``c·tanh(s/c)`` (Gemma 2, arXiv:2408.00118).
        sinks: ``[heads]``, finite or -inf, a logit per head that adds to the softmax's sum and has no value.
        cu_seqlens_q, cu_seqlens_k: ``[sequences + 1]`` int32 or int64, where packed sequences start and end,
            from 0 to the number of tokens; q, k, v then have no batch dimension, and sequences don't see each
            other. cu_seqlens_k defaults to cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: at least the longest sequence: on a GPU triton then waits for nothing, as CUDA
            graphs demand; tokens beyond one that is too small become NaN there. The cuda kernels need none; on a CPU
            one that is too small is an error.
        return_lse: also return the scores' log-sum-exp, ``[batch, heads, seq_q]`` (packed: ``[heads, tokens]``),
            float32, -inf where nothing is seen; gradients flow through it.
        deterministic: the same gradients, bit for bit, at every call.
        layout: ``"bshd"``, or ``"bhsd"``: q, k, v and the output are ``[batch, heads, seq, head_dim]``. Neither
            copies anything.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``; None chooses (see ``explain``).

    Returns:
        ``[batch, seq_q, heads, head_dim of v]`` in the dtype of q, in this memory order; with return_lse
        ``(out, lse)``.

    Under autocast q, k and v are cast to its dtype, as by ``F.scaled_dot_product_attention``. Scores, softmax and sums
    are float32; probabilities are rounded to the dtype before they meet the values. What a query doesn't see does not
    change its output, NaN and infinity included (in k; in v with the cpu kernels alone: elsewhere 0 · NaN is NaN). The
    kernels take a head_dim up to 256 and differentiate once. Where nothing needs a gradient, a few queries against
    long keys take the kernel of :func:`flash_decode`. The torch backend calls PyTorch's
    ``scaled_dot_product_attention`` for what that can express.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device, cu_seqlens that don't
            rise from 0 to the tokens or a max_seqlen that is too small (on a GPU with FASTLLM_DEBUG=1), or a
            ``backend`` that can't run this call.
    """
    packed = cu_seqlens_q is not None
    if layout != "bshd":
        if layout != "bhsd" or packed:
            raise ValueError(f"flash_attention: layout must be 'bshd' or, without cu_seqlens, 'bhsd', not {layout!r}")
        for name, t in (("q", q), ("k", k), ("v", v)):
            checks.floating("flash_attention", name, t, min_dim=4)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = check_heads("flash_attention", q, k, v, ("k", "v"), 3 if packed else 4)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("flash_attention", "scale", scale)
    options = Options(scale, *bounds("flash_attention", causal, window), checks.softcap("flash_attention", softcap))
    if causal and not packed and q.shape[1] > k.shape[1] > 0 and not torch.compiler.is_compiling():
        warnings.warn(
            f"flash_attention: causal, with more queries ({q.shape[1]}) than keys ({k.shape[1]}): the first see none "
            "and give 0"
            + ('. For tensors [batch, heads, seq, head_dim] pass layout="bhsd"' if layout == "bshd" else ""),
            stacklevel=2,
        )
    if sinks is not None:
        checks.parameter("flash_attention", "sinks", sinks, "q", q, (q.shape[-2],))
    if not packed and cu_seqlens_k is not None:
        raise ValueError("flash_attention: cu_seqlens_k was given without cu_seqlens_q")
    if cu_seqlens_q is not None:
        if not torch.compiler.is_compiling():
            for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
                if most is not None and checks.integer("flash_attention", name, most) < 0:
                    raise ValueError(f"flash_attention: {name} must be at least the longest sequence, not {most}")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_seqlen_k = max_seqlen_q if cu_seqlens_k is cu_seqlens_q and max_seqlen_k is None else max_seqlen_k
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            checks.indices("flash_attention", name, cu, "q", q)
            if cu.dim() != 1 or cu.numel() == 0:
                raise ValueError(f"flash_attention: {name} must be [sequences + 1], it has shape {list(cu.shape)}")
        checks.sized("flash_attention", "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)
    chosen = backends.select("flash_attention", q, backend, too_wide(q, v))
    if not isinstance(chosen, str):  # an Explanation
        return chosen
    packing = UNPACKED
    if cu_seqlens_q is not None:
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0)
    if chosen == "torch":
        out, lse = _torch(q, k, v, sinks, packing, options, return_lse)
    else:
        wanted = differentiated(q, k, v, sinks)
        run = _flash_attention if wanted else _FlashAttention.forward
        out, lse = run(q, k, v, sinks, packing, options, wanted, wanted or return_lse, bool(deterministic), chosen)
    if layout == "bhsd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse and lse is not None else out  # there is one where it was asked for


def check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], dims: int, paged: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The three, checked, as autocast casts them; ``paged``: k and v are pools of pages, whatever the batch is."""
    layout = "[tokens, heads, head_dim]" if dims == 3 else "[batch, seq, heads, head_dim]"
    for name, t in zip(("q", *names), (q, k, v), strict=True):
        checks.floating(op, name, t)
        if t.ndim != dims:
            raise ValueError(f"{op}: {name} must be {layout}, it has shape {list(t.shape)}")
    q, k, v = checks.autocast(q, k, v)
    *batch, _, heads, dim = q.shape
    *batch_k, seq_k, kv_heads, dim_k = k.shape
    batch = batch_k if paged else batch
    *rest_v, dim_v = v.shape
    if not (
        (k.dtype is v.dtype is q.dtype and k.device == v.device == q.device)
        and (batch_k == batch and dim_k == dim and rest_v == [*batch, seq_k, kv_heads])
    ):  # one of these says what is wrong
        checks.like(op, names[0], k, "q", q, shape=(*batch, seq_k, kv_heads, dim))
        checks.like(op, names[1], v, names[0], k, shape=(*batch, seq_k, kv_heads, dim_v))
    if dim == 0 or dim_v == 0:
        raise ValueError(f"{op}: head_dim, the last dimension, of q or {names[1]} is 0; it needs at least 1")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: the heads of q ({heads}) must be a multiple of those of {' and '.join(names)} ({kv_heads})"
        )
    return q, k, v


def too_wide(q: Tensor, v: Tensor) -> backends.WhyNot | None:
    """For backends.select."""
    if q.shape[-1] <= LARGEST_HEAD and v.shape[-1] <= LARGEST_HEAD:
        return None
    return lambda backend: f"its kernels take a head_dim up to {LARGEST_HEAD}"


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        packing: Packing,
        options: Options,
        differentiated: bool,
        wants_lse: bool,
        deterministic: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        wide_sinks = None if sinks is None else sinks.float()
        return attention_forward(q, k, v, wide_sinks, packing, options, differentiated, wants_lse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, packing, ctx.options, _, _, ctx.deterministic, ctx.backend = inputs
        ctx.max_seqlens = packing[2:]
        ctx.save_for_backward(q, k, v, sinks, *output, *packing[:2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, cu_q, cu_k = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 10
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:  # may be NaN where an lse of -inf was masked: 0 · inf
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        packing = Packing(cu_q, cu_k, *ctx.max_seqlens)
        dq, dk, dv, delta = attention_backward(
            dout, dlse, q, k, v, out, lse, packing, ctx.options, ctx.deterministic, ctx.backend
        )
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = torch.exp(sinks.float().unsqueeze(-1) - lse)  # the sink's probability, [..., heads, seq_q]
            share = share.masked_fill(lse == -torch.inf, 0.0)  # nothing seen, and a sink of -inf
            dsinks = -(share * delta).sum(-1)
            dsinks = (dsinks if cu_q is not None else dsinks.sum(0)).to(sinks.dtype)
        grads = (differentiable_once("flash_attention", q, g) for g in (dq, dk, dv, dsinks))
        return (*grads, *(None,) * 6)


_flash_attention = function(_FlashAttention)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    packing: Packing,
    options: Options,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    seq_q, seq_k = q.shape[-3], k.shape[-3]
    causal = options.right == 0
    unseen = causal and seq_q > seq_k  # queries that see nothing: PyTorch would give NaN
    if (
        packing.cu_seqlens_q is None
        and sinks is None
        and backends.transformed() is None
        and options.scale > 0  # causal, PyTorch gives NaN for others
        and not (return_lse or options.softcap or options.windowed or unseen)
    ):
        return _sdpa(q, k, v, causal, options.scale), None
    if has_values():
        check_packing(q, k, packing)
    return reference.flash_attention(
        q,
        k,
        v,
        causal=False,
        scale=options.scale,
        window=(options.left, options.right),
        softcap=options.softcap,
        sinks=sinks,
        cu_seqlens_q=packing.cu_seqlens_q,
        cu_seqlens_k=packing.cu_seqlens_k,
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    seq_q, seq_k = q.shape[1], k.shape[1]
    mask, square = None, False
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210 (bool() of symbolic sizes stays symbolic)
    if causal and seq_q == seq_k:
        square = True
    elif causal and 1 < seq_q < seq_k and torch.compiler.is_compiling():
        mask = reference._visible(seq_q, seq_k, UNBOUNDED, 0, q.device)
    elif causal and 1 < seq_q < seq_k:
        from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo, which takes a second

        mask = causal_lower_right(seq_q, seq_k)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped,
    )  # fmt: skip
    return out.transpose(1, 2)
