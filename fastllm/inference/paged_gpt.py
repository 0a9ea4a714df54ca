"""The forward pass of a GPT for many sequences at once, whose keys and values lie in pages of one pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..kernels import (
    PackedWeight,
    flash_attention,
    flash_decode,
    pack_weight,
    packed_linear,
    rms_norm,
    rope_append,
)
from ..model.gpt import GPT, Block
from ..model.rope import rotary_tables


@dataclass(frozen=True)
class DecodeRows:
    """Rows ``first`` to ``first + sequences · queries``: the latest tokens of sequences, equally many of each."""

    first: int
    queries: int
    block_table: Tensor  # [sequences, pages] int32
    lengths: Tensor  # [sequences], the queries included


@dataclass(frozen=True)
class PromptRows:
    """Rows from ``first`` to the end: parts of prompts, one after another."""

    first: int
    cu_queries: Tensor  # [sequences + 1] int32: where each part begins
    cu_keys: Tensor  # [sequences + 1] int32: the same of the tokens that it sees
    key_slots: Tensor  # [keys] int64: where these tokens lie in the pool
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Rows:
    """The tokens of a step."""

    tokens: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, in their sequences
    slots: Tensor  # [rows] int64: where their keys and values are written, page · page_size + offset
    wanted: Tensor | None  # [n] int64: the rows whose next token is asked for; None: all
    decode: list[DecodeRows] = field(default_factory=list)
    prompts: PromptRows | None = None


class _Layer:
    """The weights of a block, packed for `packed_linear`: projections of one input are one matrix."""

    def __init__(self, block: Block, quantize: str | None) -> None:
        def pack(*linears: torch.nn.Linear) -> PackedWeight:
            return pack_weight(torch.cat([linear.weight.detach() for linear in linears]), quantize=quantize)

        attention, mlp = block.self_attn, block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv = pack(*projections)
        biases = [p.bias.detach() for p in projections if p.bias is not None]
        self.qkv_bias = torch.cat(biases) if biases else None
        self.o = pack(attention.o_proj)
        gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        self.swiglu = pack_weight(up, gate=gate, quantize=quantize)
        self.down = pack(mlp.down_proj)
        self.input_norm = _weight(block.input_layernorm)
        self.mlp_norm = _weight(block.post_attention_layernorm)
        self.q_norm, self.k_norm = (None if n is None else _weight(n) for n in (attention.q_norm, attention.k_norm))


def _weight(norm: torch.nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


class PagedGPT:
    """A GPT's weights, packed, and the pool of keys and values.

    A row's result depends on its own sequence alone, bit by bit on a CPU: each op computes a row from that row.

    Args:
        model: whose weights are copied as they are now; the embedding and the norms are shared with it.
        pages, page_size: of the pool.
        max_seq_len: positions of the rotary tables.
        quantize: None, or "int8" for weights of 8 bits with a scale for each row.
    """

    def __init__(self, model: GPT, pages: int, page_size: int, max_seq_len: int, quantize: str | None = None) -> None:
        self.config = model.config
        self.embedding = model.model.embed_tokens.weight.detach()
        self.head = pack_weight(model.head_weight.detach(), quantize=quantize)
        self.layers = [_Layer(block, quantize) for block in model.model.layers if isinstance(block, Block)]
        self.norm = _weight(model.model.norm)
        self.device = self.embedding.device
        self.allocate(pages, page_size, max_seq_len)

    def allocate(self, pages: int, page_size: int, max_seq_len: int) -> None:
        """Make the pool and the rotary tables anew; what the pool held is gone."""
        config = self.config
        self.cos, self.sin = (table.to(self.device) for table in rotary_tables(config, max_seq_len))
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        self.keys, self.values = self.embedding.new_empty(shape), self.embedding.new_empty(shape)
        self.pools = [*zip(self.keys, self.values, strict=True)]

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> Tensor:
        """``[wanted, vocab_size]`` float32: the logits of the tokens after the wanted rows."""
        return self.forward(embedding(rows.tokens, self.embedding), rows)

    @torch.inference_mode()
    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """The same of embedded tokens ``x`` ``[rows, dim]``. Of rows that all decode and are all wanted (``wanted`` is
        None) kernels compute all of it."""
        return self.logits(self.hidden(x, rows))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, vocab_size]`` float32, of hidden states ``[n, dim]``."""
        return packed_linear(hidden, self.head, out_dtype=torch.float32)

    @torch.inference_mode()
    def hidden(self, x: Tensor, rows: Rows) -> Tensor:
        """``[wanted, dim]``: what the head gets of the wanted rows; see :meth:`forward`."""
        config, residual = self.config, None
        heads = [config.heads, config.kv_heads, config.kv_heads]
        for layer, (keys, values) in zip(self.layers, self.pools, strict=True):
            if residual is None:
                h, residual = rms_norm(x, layer.input_norm, eps=config.norm_eps), x
            else:
                h, residual = rms_norm(x, layer.input_norm, eps=config.norm_eps, residual=residual)
            qkv = packed_linear(h, layer.qkv, layer.qkv_bias).view(-1, sum(heads), config.head_dim)
            q, k, v = qkv.split(heads, dim=1)
            if layer.q_norm is not None:
                q = rms_norm(q, layer.q_norm, eps=config.norm_eps)
                k = rms_norm(k, layer.k_norm, eps=config.norm_eps)
            q = rope_append(q, k, v, self.cos, self.sin, rows.positions, keys, values, rows.slots)
            x = self._attend(q, keys, values, rows).flatten(1)
            if layer is self.layers[-1] and rows.wanted is not None:  # nothing reads the others any more
                x, residual = x[rows.wanted], residual[rows.wanted]
            x = packed_linear(x, layer.o)
            h, residual = rms_norm(x, layer.mlp_norm, eps=config.norm_eps, residual=residual)
            x = packed_linear(packed_linear(h, layer.swiglu), layer.down)
        return rms_norm(x, self.norm, eps=config.norm_eps, residual=residual)[0]

    @property
    def launches(self) -> int:
        """Kernels of a step of rows that decode and are all wanted."""
        return self.config.layers * (8 + 2 * self.config.qk_norm) + 2

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """Attention of each row to the keys of its sequence so far."""
        window = self.config.window or None
        outs: list[Tensor] = []
        for part in rows.decode:
            part_q = q[part.first : part.first + len(part.lengths) * part.queries].unflatten(0, (-1, part.queries))
            out = flash_decode(part_q, keys, values, part.lengths, block_table=part.block_table, window=window)
            outs.append(out.flatten(0, 1))
        if (prompts := rows.prompts) is not None:
            # rows of one dimension: of two, index_select takes ten times as long
            slots, heads = prompts.key_slots, keys.shape[2:]
            k, v = (p.flatten(0, 1).flatten(1).index_select(0, slots).unflatten(1, heads) for p in (keys, values))
            outs.append(
                flash_attention(
                    q[prompts.first :], k, v, window=window, cu_seqlens_q=prompts.cu_queries,
                    cu_seqlens_k=prompts.cu_keys, max_seqlen_q=prompts.most_queries, max_seqlen_k=prompts.most_keys,
                )
            )  # fmt: skip
        return outs[0] if len(outs) == 1 else torch.cat(outs)
