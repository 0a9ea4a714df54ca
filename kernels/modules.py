"""The ops as ``nn.Module``s, with the parameter names of torch.nn and Hugging Face transformers."""

from __future__ import annotations

from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from .activation import swiglu
from .attention import flash_attention
from .loss import cross_entropy, linear_cross_entropy
from .norm import rms_norm
from .rotary import rope


class RMSNorm(nn.Module):
    """:func:`rms_norm` over the last dimension, with a learnt weight ``[dim]``.

    Args:
        dim: the size of the last dimension.
        eps: added to the mean of squares.
        weight_offset: added to the weight (1.0 for Gemma); the weight starts at ``1 - weight_offset``.
        elementwise_affine: whether there is a weight at all.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.weight_offset = dim, eps, weight_offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if elementwise_affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., dim]`` to ``[..., dim]``; with a residual ``(y, x + residual)``."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.dim}, eps={self.eps}{offset}, elementwise_affine={self.weight is not None}"


class SwiGLU(nn.Module):
    """The gated MLP of Llama: ``down_proj(silu(gate_proj(x)) · up_proj(x))``."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden_dim, **where)
        self.up_proj = nn.Linear(dim, hidden_dim, **where)
        self.down_proj = nn.Linear(hidden_dim, dim, **where)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class KeyValueCache(Protocol):
    """What :class:`CausalSelfAttention` asks of a cache: take new keys and values, give back all so far."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class CausalSelfAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads, as in Llama and Qwen3.

    Args:
        dim: features of the input and output.
        heads: query heads.
        kv_heads: key/value heads, a divisor of heads; None is heads.
        head_dim: None is ``dim // heads``.
        qk_norm: RMSNorm on each head's queries and keys before the rotation (Qwen3).
        window, softcap: see :func:`flash_attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
        window: int | None = None,
        softcap: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"CausalSelfAttention: heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
        if head_dim is None and dim % heads:
            raise ValueError(
                f"CausalSelfAttention: dim ({dim}) must be a multiple of heads ({heads}), or give head_dim"
            )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.window, self.softcap = window, softcap
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias, **where)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False, **where)
        self.q_norm = RMSNorm(self.head_dim, eps, **where) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps, **where) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """``[batch, seq, dim]`` to the same; cos, sin ``[max_seq, head_dim / 2]``; positions ``[batch, seq]``.

        cu_seqlens ``[documents + 1]``: where documents start and end in the ``batch · seq`` tokens. A document lies
        inside of one sequence, and sees no other; empty ones may stand at the end.
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, cos, sin, positions=positions)
        if cache is not None:
            k, v = cache.update(k, v)
        if cu_seqlens is None:
            out = flash_attention(q, k, v, window=self.window, softcap=self.softcap)
        else:
            out = flash_attention(
                *(t.flatten(0, 1) for t in (q, k, v)), window=self.window, softcap=self.softcap,
                cu_seqlens_q=cu_seqlens, max_seqlen_q=q.shape[1],
            ).unflatten(0, q.shape[:2])  # fmt: skip
        return self.o_proj(out.flatten(-2))


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy` with the argument names of ``torch.nn.CrossEntropyLoss``; classes come last."""

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.inplace_backward = inplace_backward
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
            "z_loss": z_loss, "softcap": softcap,
        }  # fmt: skip

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``logits`` ``[..., classes]``, ``target`` ``[...]``."""
        return cross_entropy(logits, target, weight=self.weight, inplace_backward=self.inplace_backward, **self.options)

    def extra_repr(self) -> str:
        return _given(self.options)


class LinearCrossEntropyLoss(nn.Module):
    """A head and its loss in one, :func:`linear_cross_entropy`, as ``torch.nn.LinearCrossEntropyLoss``.

    Its parameters are ``linear.weight`` ``[num_classes, in_features]`` and ``linear.bias`` ``[num_classes]``;
    the buffer ``weight`` holds class weights.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        accumulate_float32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
            "z_loss": z_loss, "softcap": softcap, "accumulate_float32": accumulate_float32,
        }  # fmt: skip

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden`` ``[..., in_features]``, ``target`` ``[...]``."""
        return linear_cross_entropy(
            hidden, self.linear.weight, target, bias=self.linear.bias, class_weight=self.weight, **self.options
        )

    def extra_repr(self) -> str:
        return _given(self.options)


def _given(options: dict[str, object]) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items())
