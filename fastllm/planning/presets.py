"""Models by name, each with the settings of a compute-optimal run."""

from __future__ import annotations

from ..config import Config, ModelConfig, ParallelConfig
from ..errors import UserError, did_you_mean
from .scaling_laws import compute_optimal


def _gpt(dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab_size: int, max_seq_len: int = 1024,
         tie_embeddings: bool = True) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        vocab_size=vocab_size, max_seq_len=max_seq_len, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads,
        ffn_dim=ffn_dim, tie_embeddings=tie_embeddings, qk_norm=True,
    )  # fmt: skip


def _llama(dim: int, layers: int, heads: int, ffn_dim: int, tie_embeddings: bool = False) -> ModelConfig:
    return _gpt(dim, layers, heads, 8, ffn_dim, 128_256, 4096, tie_embeddings)


SELECTIVE = ParallelConfig(reshard_after_forward=True, activation_checkpointing="selective")
FULL = ParallelConfig(reshard_after_forward=True, activation_checkpointing="full")

PRESETS: dict[str, Config] = {
    "default": Config(),  # under two minutes on two CPU cores
    "15m": compute_optimal(_gpt(256, 8, 4, 2, 704, 32_768), 32),
    "30m": compute_optimal(_gpt(384, 10, 6, 2, 1024, 32_768), 32),
    "124m": compute_optimal(_gpt(768, 12, 12, 12, 2048, 50_304), 32),
    "350m": compute_optimal(_gpt(1024, 24, 16, 8, 3072, 50_304), 16),
    "680m": compute_optimal(_gpt(1536, 24, 12, 4, 4096, 50_304, 2048), 8),
    "1.5b": compute_optimal(_gpt(2048, 30, 16, 8, 5632, 50_304, 2048), 8, SELECTIVE),
    "3b": compute_optimal(_llama(3072, 28, 24, 8192, tie_embeddings=True), 4, SELECTIVE),
    "8b": compute_optimal(_llama(4096, 32, 32, 14_336), 2, SELECTIVE),
    "13b": compute_optimal(_llama(5120, 40, 40, 14_336), 1, SELECTIVE),
    "35b": compute_optimal(_llama(7168, 60, 56, 20_480), 1, FULL),
    "70b": compute_optimal(_llama(8192, 80, 64, 28_672), 1, FULL),
}


def preset(name: str) -> Config:
    """The preset ``name``; UserError where there is none."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
