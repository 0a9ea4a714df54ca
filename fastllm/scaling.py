"""What a model costs and what it should be given: parameters, FLOPs, and the settings of a compute-optimal run.

Formulas of the configuration alone; PyTorch is not imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig

TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556)


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


@dataclass(frozen=True)
class Budget:
    """A compute-optimal run of a model."""

    tokens: float
    flops: float
    batch_tokens: int
    lr: float
    steps: int


def budget(model: ModelConfig, tokens: float | None = None) -> Budget:
    """For ``tokens`` (None: 20 for each parameter).

    Batch and learning rate by the power laws that DeepSeek LLM fitted on the compute C, 0.292·C^0.3271 tokens and
    0.3118·C^-0.125 (Bi et al. 2024, arXiv:2401.02954, section 3.1); the batch as a power of two of sequences.
    """
    tokens = tokens or TOKENS_PER_PARAMETER * count_parameters(model)["total"]
    flops = flops_per_token(model) * tokens
    batch = model.context * 2 ** max(0, round(math.log2(0.2920 * flops**0.3271 / model.context)))
    lr = float(f"{0.3118 * flops**-0.1250:.1e}")
    return Budget(tokens, flops, batch, lr, max(1, math.ceil(tokens / batch)))


def optimal(model: ModelConfig, micro_batch: int, parallel: ParallelConfig | None = None) -> Config:
    """The configuration of a compute-optimal run."""
    found = budget(model)
    return Config(
        model=model,
        optim=OptimConfig(lr=found.lr),
        train=TrainConfig(
            steps=found.steps, batch_tokens=found.batch_tokens, micro_batch=micro_batch, eval_every=250,
            eval_tokens=1_048_576,
        ),
        parallel=parallel or ParallelConfig(),
    )  # fmt: skip


def of_depth(layers: int, vocab_size: int = 50_304, context: int = 2048) -> ModelConfig:
    """The dial: 64 features for each layer, heads of 64 features (128 from 1,024 on), 4 query heads to a key.

    The MLP has 8/3 of the width, in multiples of 128.
    """
    dim = max(128, 64 * layers)
    size = 128 if dim >= 1024 else 64
    dim = math.ceil(dim / size) * size
    heads = dim // size
    kv_heads = max(n for n in range(1, max(1, heads // 4) + 1) if heads % n == 0)
    return ModelConfig(
        vocab_size=vocab_size, context=context, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads,
        hidden_dim=math.ceil(dim * 8 / 3 / 128) * 128, qk_norm=True,
    )  # fmt: skip


def of_parameters(parameters: float, vocab_size: int = 50_304, context: int = 2048) -> ModelConfig:
    """The model on the dial that is nearest in size."""
    models = [of_depth(layers, vocab_size, context) for layers in range(1, 161)]
    return min(models, key=lambda model: abs(math.log(count_parameters(model)["total"] / parameters)))
