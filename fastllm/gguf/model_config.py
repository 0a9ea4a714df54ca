"""The GPT's configuration for the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..config import ModelConfig, built
from ..errors import UserError
from ..input_files import MAX_SIZE, Keys, one_line, shown
from ..model.rope import rope_frequencies
from .header import Header
from .tensors import read_tensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's frequencies are divided by

# Keys that say nothing about what the model computes, or what the tensors say too.
_IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal"}
# Keys of models that the GPT is not, and their values in a model that it is.
_NEUTRAL: dict[str, float] = {
    "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0, "nextn_predict_layers": 0, "pooling_type": 0,
    "attention.scale": 0, "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1, "attention.clamp_kqv": 0,
}  # fmt: skip
# Settings of YaRN, and the only values that the GPT has.
_YARN: dict[str, float] = {
    "rope.scaling.yarn_beta_fast": 32, "rope.scaling.yarn_beta_slow": 1, "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
}  # fmt: skip


def model_config(header: Header) -> ModelConfig:
    """The configuration of the model in a GGUF file; UserError where the GPT does not have all that it says."""
    path = header.path
    kind = header.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture is {shown(kind)}; fastllm's GPT reads {', '.join(ARCHITECTURES)}"
        )
    keys = _Used(header.keys(f"{kind}."))
    for key, value in _NEUTRAL.items():
        keys.must(key, value)
    dim, layers, ffn_dim = map(keys.integer, ("embedding_length", "block_count", "feed_forward_length"))
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(dim // heads, 1))
    keys.must("attention.value_length", head_dim)
    keys.must("rope.dimension_count", head_dim)
    if heads * head_dim > MAX_SIZE:
        raise UserError(f"{path}: {kind}.attention.head_count ({heads}) times the size of a head is over {MAX_SIZE}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} has no matrix token_embd.weight")
    max_seq_len = keys.integer("context_length")
    config = built(
        path,
        ModelConfig,
        vocab_size=embedding.shape[0],
        max_seq_len=max_seq_len,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        attention_dim=0 if head_dim * heads == dim else head_dim * heads,
        ffn_dim=ffn_dim,
        window=keys.integer("attention.sliding_window", 0, least=0),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", least=0, most=1),
        qk_norm="blk.0.attn_q_norm.weight" in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        tie_embeddings="output.weight" not in header.tensors,
        **_rope(keys, header, head_dim, max_seq_len),
    )
    keys.check_rest()
    return config


class _Used:
    """Keys, and which of them were asked for: one that nobody asks for may mean something that the GPT does not do."""

    def __init__(self, keys: Keys) -> None:
        self.keys, self.used = keys, set(_IGNORED)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        self.used.add(key)
        value = self.keys.values.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            self.keys.values[key] = int(value[0])  # of each layer, and all the same
        return self.keys.integer(key, default, least=least)

    def number(
        self, key: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float:
        self.used.add(key)
        return self.keys.number(key, default, least=least, most=most)

    def string(self, key: str, default: str) -> str:
        self.used.add(key)
        return self.keys.string(key, default)

    def must(self, key: str, wanted: float) -> None:
        self.used.add(key)
        value = self.keys.values.get(key, wanted)
        if isinstance(value, np.ndarray | list | str) or not math.isclose(value, wanted, rel_tol=1e-6):
            raise UserError(f"{self.name(key)} is {shown(value)}, which fastllm's GPT does not have")

    def check_rest(self) -> None:
        for key, value in self.keys.values.items():
            if key not in self.used:
                raise UserError(f"{self.name(key)} is {shown(value)}: fastllm does not know what it means")

    def name(self, key: str) -> str:
        return f"{self.keys.path}: {self.keys.prefix}{one_line(key)}"


def _rope(keys: _Used, header: Header, head_dim: int, max_seq_len: int) -> dict[str, Any]:
    """The rotary fields."""
    theta = keys.number("rope.freq_base", 10_000.0, least=1)
    fields: dict[str, Any] = {"rope_theta": theta}
    kind = keys.string("rope.scaling.type", "linear" if "rope.scale_linear" in keys.keys.values else "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    original = keys.integer("rope.scaling.original_context_length", max_seq_len)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{keys.name('rope.scaling.type')} is {shown(kind)}; fastllm's GPT has none, linear and yarn")
    if kind != "none" and factor not in (0.0, 1.0):  # 0: none, to llama.cpp
        fields |= {"rope_scaling": kind, "rope_factor": factor}
    if kind == "yarn":
        if "rope_factor" in fields:
            fields["rope_original_max_seq_len"] = original
        for key, value in _YARN.items():
            keys.must(key, value)
        keys.must("rope.scaling.attn_factor", 1.0)
    if ROPE_FACTORS in header.tensors:
        if "rope_scaling" in fields:
            raise UserError(f"{header.path} has both {kind} rope scaling and {ROPE_FACTORS}")
        fields |= _llama3(header, theta, head_dim)
    return fields


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """The fields of Llama 3's scaling, whose factors for each pair of features the file holds.

    Pairs that turn often have the factor 1, and slow ones that of the scaling. The length before scaling follows from
    those between, because a pair's factor there depends on how often it turns within that length.
    """
    path = header.path
    factors = read_tensor(header, ROPE_FACTORS).double()
    if factors.shape != (head_dim // 2,):
        raise UserError(f"{path}: {ROPE_FACTORS} is {list(factors.shape)}, the head size makes it {[head_dim // 2]}")
    largest = float(factors.max())
    if not bool((factors >= 1).all()) or not math.isfinite(largest):
        raise UserError(f"{path}: {ROPE_FACTORS} has values below 1, or that are not finite")
    if largest == 1:
        return {}
    turn = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # in tokens
    kept = (1 / factors - 1 / largest) / (1 - 1 / largest)
    between, fast = (kept > 1e-3) & (kept < 1 - 1e-3), kept > 0.5
    if between.any():
        original = round(float(((1 + 3 * kept) * turn)[between].median()))
    else:  # any length in which the fast pairs turn four times, and the slow ones at most once
        original = math.ceil(4 * float(turn[fast].max())) if fast.any() else math.floor(float(turn.min()))
    fields = {"rope_scaling": "llama3", "rope_factor": largest, "rope_original_max_seq_len": min(original, MAX_SIZE)}
    sizes = {"dim": head_dim, "heads": 1, "kv_heads": 1}
    scaled = rope_frequencies(built(path, ModelConfig, rope_theta=theta, **sizes, **fields))
    if not torch.allclose(2 * math.pi / turn / scaled, factors, rtol=2e-5):  # they were computed in float32
        raise UserError(f"{path}: the values of {ROPE_FACTORS} are not those of Llama 3's scaling, the GPT's only one")
    return fields
