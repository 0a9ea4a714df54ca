"""The GPT: a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU, on fastllm.kernels."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..dtensor import local, own_slice
from ..kernels import CausalSelfAttention, RMSNorm, SwiGLU, linear_cross_entropy
from .kv_cache import KVCache, LayerCache
from .rope import rotary_tables


class Block(nn.Module):
    """Attention and MLP, each behind a norm that also adds what the layer before it gave to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = CausalSelfAttention(
            config.dim, config.heads, config.kv_heads, config.head_dim, bias=config.qkv_bias, qk_norm=config.qk_norm,
            eps=config.norm_eps, window=config.window or None,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden_dim)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``x`` and ``residual`` ``[batch, seq, dim]``: what is to be added to the stream, and the stream."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos, sin, positions=positions, cache=cache)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Embedding, blocks and last norm: everything but the head. Called ``model``, as in Hugging Face's Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """``tokens`` ``[batch, seq]`` to hidden states ``[batch, seq, dim]``."""
        start = cache.length if cache else 0
        end, context = start + tokens.shape[1], self.cos.shape[0]
        if end > context:
            raise ValueError(f"GPT: {end} tokens are more than the context of {context}")
        positions = torch.arange(start, end, device=tokens.device).expand_as(tokens) if cache else None
        x, residual = self.embed_tokens(tokens), None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, self.cos, self.sin, positions, cache.layers[i] if cache else None)
        return self.norm(x, residual)[0]


class GPT(nn.Module):
    """A language model; parameter names are those of Hugging Face's Llama.

    Built on the CPU with weights that depend on ``seed`` and their names only; None leaves them as they are allocated.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal, 1/sqrt(features); zero where a layer writes to the residual stream: each begins as the identity.

        A sharded parameter gets its part of what the whole would have been. The rotary tables are filled too.
        """
        for table, values in zip((self.model.cos, self.model.sin), rotary_tables(self.config), strict=True):
            table.copy_(values)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                local(p).fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                local(p).zero_()
            else:
                _normal(local(p), own_slice(p), p.shape[1], f"{seed} {name}")

    @property
    def head_weight(self) -> Tensor:
        """``[vocab_size, dim]``."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """``tokens`` ``[batch, seq]``; with ``targets`` ``[batch, seq]`` the loss in nats per token, else logits.

        Targets of -100 don't count. ``reduction="sum"``: the nats of all of them. With a cache the tokens follow those
        that it holds, and join them.
        """
        hidden = self.model(tokens, cache)
        if targets is not None:
            return linear_cross_entropy(hidden, self.head_weight, targets, reduction=reduction)
        return nn.functional.linear(hidden, self.head_weight)

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """``[batch, vocab_size]``: the logits of the token after ``tokens`` ``[batch, seq]``."""
        return nn.functional.linear(self.model(tokens, cache)[:, -1], self.head_weight)


ROWS = 64  # of a weight that are drawn together


def _normal(part: Tensor, where: tuple[slice, ...], features: int, name: str) -> None:
    """Fill ``part`` with what lies at ``where`` in a matrix that ``name`` alone decides.

    Every block of rows has a generator of its own, so that a process draws only the blocks that it holds rows of.
    """
    rows, columns = where
    for first in range(rows.start // ROWS * ROWS, rows.stop, ROWS):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {first}".encode()))
        block = torch.empty(ROWS, features).normal_(0.0, features**-0.5, generator=generator)
        low, high = max(first, rows.start), min(first + ROWS, rows.stop)
        part[low - rows.start : high - rows.start] = block[low - first : high - first, columns]
