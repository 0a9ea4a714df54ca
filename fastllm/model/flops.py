"""Parameters and FLOPs of a model, from its configuration alone; PyTorch is not imported."""

from __future__ import annotations

from ..config import ModelConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, and in all (a tied head counts nothing)."""
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * config.dim * (q_dim + kv_dim) + (2 * config.head_dim if config.qk_norm else 0)
    attention += q_dim + 2 * kv_dim if config.qkv_bias else 0
    parts = {
        "embedding": config.vocab_size * config.dim,
        "attention": config.layers * attention,
        "mlp": config.layers * 3 * config.dim * config.hidden_dim,
        "norms": (2 * config.layers + 1) * config.dim,
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config: ModelConfig) -> int:
    """Of a training step, forward and backward, per token at the full context; what is recomputed does not count.

    6 for each weight of a matrix product (the head is one, the embedding is not) and, for the scores and the sums of
    causal attention, 12 for each feature of the heads and each of the keys that a token sees on average (Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B, without the half that is masked).
    """
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.layers * (2 * config.dim * (q_dim + kv_dim) + 3 * config.dim * config.hidden_dim)
    weights += config.vocab_size * config.dim
    window = min(config.window or config.context, config.context)
    keys = window - window * (window - 1) / (2 * config.context)
    return round(6 * weights + 12 * config.layers * q_dim * keys)
