"""Compute-optimal settings of a model, and models by size. PyTorch is not imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from ..model.flops import count_parameters, flops_per_token

TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556)


@dataclass(frozen=True)
class Budget:
    """A compute-optimal run of a model."""

    tokens: float
    flops: float
    global_batch_tokens: int
    lr: float
    steps: int


def budget(model: ModelConfig, tokens: float | None = None) -> Budget:
    """Of a run over ``tokens`` (None: 20 for each parameter).

    Batch size and learning rate follow the power laws that DeepSeek LLM fitted to the compute C: 0.292·C^0.3271 tokens
    and 0.3118·C^-0.125 (Bi et al. 2024, arXiv:2401.02954, section 3.1). The batch is a power of two of sequences.
    """
    tokens = tokens or TOKENS_PER_PARAMETER * count_parameters(model)["total"]
    flops = flops_per_token(model) * tokens
    batch = model.max_seq_len * 2 ** max(0, round(math.log2(0.2920 * flops**0.3271 / model.max_seq_len)))
    lr = float(f"{0.3118 * flops**-0.1250:.1e}")
    return Budget(tokens, flops, batch, lr, max(1, math.ceil(tokens / batch)))


def compute_optimal(model: ModelConfig, micro_batch: int, parallel: ParallelConfig | None = None) -> Config:
    """The configuration of a compute-optimal run."""
    found = budget(model)
    return Config(
        model=model,
        optim=OptimConfig(lr=found.lr),
        train=TrainConfig(
            steps=found.steps, global_batch_tokens=found.global_batch_tokens, micro_batch=micro_batch, eval_every=250,
            eval_tokens=1_048_576,
        ),
        parallel=parallel or ParallelConfig(),
    )  # fmt: skip


def model_of_depth(layers: int, vocab_size: int = 50_304, max_seq_len: int = 2048) -> ModelConfig:
    """A model of any depth: 64 features a layer, heads of 64 features (128 from a width of 1,024).

    4 query heads share a key head. The MLP has 8/3 of the width, rounded up to a multiple of 128.
    """
    dim = max(128, 64 * layers)
    size = 128 if dim >= 1024 else 64
    dim = math.ceil(dim / size) * size
    heads = dim // size
    kv_heads = max(n for n in range(1, max(1, heads // 4) + 1) if heads % n == 0)
    return ModelConfig(
        vocab_size=vocab_size, max_seq_len=max_seq_len, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads,
        ffn_dim=math.ceil(dim * 8 / 3 / 128) * 128, qk_norm=True,
    )  # fmt: skip


def model_of_size(parameters: float, vocab_size: int = 50_304, max_seq_len: int = 2048) -> ModelConfig:
    """The :func:`model_of_depth` that is nearest in size."""
    models = [model_of_depth(layers, vocab_size, max_seq_len) for layers in range(1, 161)]
    return min(models, key=lambda model: abs(math.log(count_parameters(model)["total"] / parameters)))
