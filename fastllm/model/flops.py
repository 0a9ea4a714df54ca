"""Parameters and FLOPs of a model, from its configuration alone; PyTorch is not imported."""

from __future__ import annotations

from ..config import ModelConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part and in total; a tied head counts 0."""
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = 2 * config.dim * (q_dim + kv_dim) + (2 * config.head_dim if config.qk_norm else 0)
    attention += q_dim + 2 * kv_dim if config.qkv_bias else 0
    parts = {
        "embedding": config.vocab_size * config.dim,
        "attention": config.layers * attention,
        "mlp": config.layers * 3 * config.dim * config.ffn_dim,
        "norms": (2 * config.layers + 1) * config.dim,
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config: ModelConfig) -> int:
    """FLOPs of a training step, forward and backward, per token of a sequence of full length, without recomputation.

    6 for each weight of a matrix product (the head is one, the embedding is not). For causal attention, 12 for each
    head feature and each key that a token attends to on average (Chowdhery et al. 2022, arXiv:2204.02311, appendix B,
    without the masked half).
    """
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.layers * (2 * config.dim * (q_dim + kv_dim) + 3 * config.dim * config.ffn_dim)
    weights += config.vocab_size * config.dim
    window = min(config.window or config.max_seq_len, config.max_seq_len)
    keys = window - window * (window - 1) / (2 * config.max_seq_len)
    return round(6 * weights + 12 * config.layers * q_dim * keys)
