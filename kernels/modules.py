"""The ops as ``nn.Module``s, with the parameter names of torch.nn and Hugging Face transformers."""

from __future__ import annotations

from typing import Protocol

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
        where = {"bias": bias, "device": device, "dtype": dtype}
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
        where = {"device": device, "dtype": dtype}
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
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """``[batch, seq, dim]`` to the same; cos, sin ``[max_seq, head_dim / 2]``; positions ``[batch, seq]``."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, cos, sin, positions=positions)
        if cache is not None:
            k, v = cache.update(k, v)
        out = flash_attention(q, k, v, window=self.window, softcap=self.softcap)
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
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap, self.inplace_backward = z_loss, softcap, inplace_backward

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """``logits`` ``[..., classes]``, ``target`` ``[...]``."""
        return cross_entropy(
            logits, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """A head without bias and its loss in one, :func:`linear_cross_entropy`; ``weight`` ``[classes, features]``."""

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=features**-0.5)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """``hidden`` ``[..., features]``, ``target`` ``[...]``."""
        return linear_cross_entropy(
            hidden, self.weight, target, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip
