"""Models by name, each with the settings of a compute-optimal run."""

from __future__ import annotations

from ..config import Config, ModelConfig, ParallelConfig
from ..errors import UserError, did_you_mean
from .scaling_laws import optimal


def _gpt(dim: int, layers: int, heads: int, kv_heads: int, hidden_dim: int, vocab_size: int, context: int = 1024,
         tie_embeddings: bool = True) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        vocab_size=vocab_size, context=context, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads,
        hidden_dim=hidden_dim, tie_embeddings=tie_embeddings, qk_norm=True,
    )  # fmt: skip


def _llama(dim: int, layers: int, heads: int, hidden_dim: int, tie_embeddings: bool = False) -> ModelConfig:
    return _gpt(dim, layers, heads, 8, hidden_dim, 128_256, 4096, tie_embeddings)


SAVING = ParallelConfig(reshard=True, recompute="selective")
SPARING = ParallelConfig(reshard=True, recompute="full")

PRESETS: dict[str, Config] = {
    "default": Config(),  # under two minutes on two CPU cores
    "15m": optimal(_gpt(256, 8, 4, 2, 704, 32_768), 32),
    "30m": optimal(_gpt(384, 10, 6, 2, 1024, 32_768), 32),
    "124m": optimal(_gpt(768, 12, 12, 12, 2048, 50_304), 32),
    "350m": optimal(_gpt(1024, 24, 16, 8, 3072, 50_304), 16),
    "680m": optimal(_gpt(1536, 24, 12, 4, 4096, 50_304, 2048), 8),
    "1.5b": optimal(_gpt(2048, 30, 16, 8, 5632, 50_304, 2048), 8, SAVING),
    "3b": optimal(_llama(3072, 28, 24, 8192, tie_embeddings=True), 4, SAVING),
    "8b": optimal(_llama(4096, 32, 32, 14_336), 2, SAVING),
    "13b": optimal(_llama(5120, 40, 40, 14_336), 1, SAVING),
    "35b": optimal(_llama(7168, 60, 56, 20_480), 1, SPARING),
    "70b": optimal(_llama(8192, 80, 64, 28_672), 1, SPARING),
}


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
