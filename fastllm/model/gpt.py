"""The GPT: a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU, on fastllm.kernels."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..dtensor import local_slice, to_local
from ..kernels import CausalSelfAttention, RMSNorm, SwiGLU, linear_cross_entropy
from .rope import rotary_tables


class Block(nn.Module):
    """Attention and MLP, each after a norm, which also adds the layer before it to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = CausalSelfAttention(
            config.dim, config.heads, config.kv_heads, config.head_dim, bias=config.qkv_bias, qk_norm=config.qk_norm,
            eps=config.norm_eps, window=config.window or None,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``x``, ``residual`` ``[batch, seq, dim]``: the last block's output, not yet added; the residual stream."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, cos, sin, positions=positions, cu_seqlens=cu_seqlens)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


TABLE_LENGTH = 2**16  # positions of the rotary tables at first; they grow where a sequence is longer


class Decoder(nn.Module):
    """Embedding, blocks and last norm: all but the head. The GPT calls it ``model``, as Hugging Face's Llama does."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(…), which draws numbers, and on the meta device imports the compiler for that.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rotary_tables(config, min(config.max_seq_len, TABLE_LENGTH))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """``tokens`` ``[batch, seq]`` to hidden states ``[batch, seq, dim]``; the others: see :class:`GPT`."""
        length, max_seq_len = (tokens if positions is None else positions).shape[1], self.config.max_seq_len
        if length > max_seq_len and cu_seqlens is None:
            raise ValueError(f"GPT: {length} tokens are more than max_seq_len ({max_seq_len})")
        if min(length, max_seq_len) > self.cos.shape[0]:
            self._grow_tables(length)
        x, residual = self.embed_tokens(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, self.cos, self.sin, positions, cu_seqlens)
        return self.norm(x, residual)[0]

    def _grow_tables(self, length: int) -> None:
        tables = rotary_tables(self.config, min(self.config.max_seq_len, max(length, 2 * self.cos.shape[0])))
        self.cos, self.sin = (table.to(self.cos) for table in tables)


class GPT(nn.Module):
    """A language model; parameter names are those of Hugging Face's Llama.

    Args:
        config: its shape.
        seed: of the initial weights, which depend on it and on their names only; None leaves them uninitialized.
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
        """Initialize the weights: normal with standard deviation 1/sqrt(features); zero in projections that write to
        the residual stream, so that each block begins as the identity. Fills the rotary tables too.

        A shard gets its part of what the full parameter would be.
        """
        tables = self.model.cos, self.model.sin
        for table, values in zip(tables, rotary_tables(self.config, len(self.model.cos)), strict=True):
            table.copy_(values)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                to_local(p).fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                to_local(p).zero_()
            else:
                _normal(to_local(p), local_slice(p), p.shape[1], f"{seed} {name}")

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
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """``tokens`` ``[batch, seq]``; with ``targets`` ``[batch, seq]`` the loss in nats per token, else logits.

        Targets of -100 are ignored. ``reduction="sum"`` adds up the nats of all targets. To generate text see
        :class:`fastllm.inference.Engine`, which keeps keys and values.

        Packed documents, which don't see each other: ``positions`` ``[batch, seq]`` are those of the tokens in their
        documents, and ``cu_seqlens`` int32 ``[documents + 1]`` where these start and end in the ``batch · seq`` tokens;
        empty ones may stand at the end. With tensor parallelism both are of the whole sequences, on each rank. A row
        may then be longer than ``max_seq_len``, but no document.

        ``head``: what is returned instead, computed from the hidden states ``[batch, seq, dim]`` and the head's weight,
        which a sharded model has whole only here.
        """
        hidden = self.model(tokens, positions, cu_seqlens)
        if head is not None:
            return head(hidden, self.head_weight)
        if targets is not None:
            return linear_cross_entropy(hidden, self.head_weight, targets, reduction=reduction)
        return nn.functional.linear(hidden, self.head_weight)


ROWS_PER_DRAW = 64  # rows of a weight that one generator draws


def _normal(shard: Tensor, where: tuple[slice, ...], features: int, name: str) -> None:
    """Fill ``shard``, which lies at ``where`` in the full matrix, from generators seeded with ``name``.

    Each block of rows has its own generator, so that each rank draws only the rows it owns.
    """
    rows, columns = where
    for first in range(rows.start // ROWS_PER_DRAW * ROWS_PER_DRAW, rows.stop, ROWS_PER_DRAW):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {first}".encode()))
        block = torch.empty(ROWS_PER_DRAW, features).normal_(0.0, features**-0.5, generator=generator)
        low, high = max(first, rows.start), min(first + ROWS_PER_DRAW, rows.stop)
        shard[low - rows.start : high - rows.start] = block[low - first : high - first, columns]
