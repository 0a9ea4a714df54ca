"""Rotary position tables, and how they are scaled to longer sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import ModelConfig


def rotary_tables(config: ModelConfig, length: int | None = None) -> tuple[Tensor, Tensor]:
    """``cos, sin`` ``[length, head_dim / 2]``, float32, of angles in float64, on the CPU; None: of max_seq_len."""
    with torch.device("cpu"):  # also where the model is built on the meta device
        frequencies = rope_frequencies(config)
        angles = torch.outer(torch.arange(length or config.max_seq_len, dtype=torch.float64), frequencies)
        size = attention_factor(config)
        return (size * angles.cos()).float(), (size * angles.sin()).float()


def attention_factor(config: ModelConfig) -> float:
    """The factor of cos and sin that keeps attention from flattening over longer sequences (YaRN, equation 22)."""
    if config.rope_scaling != "yarn":
        return 1.0
    return 0.1 * math.log(max(1.0, config.rope_factor)) + 1.0


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians from one token to the next for each pair of features, float64 ``[head_dim / 2]``.

    - linear: positions are divided by the factor (Chen et al. 2023, arXiv:2306.15595).
    - yarn: only pairs that turn less than once within the original length are scaled; pairs that turn more than 32
      times are kept. Between them the kept share falls linearly with the pair's index (Peng et al. 2023,
      arXiv:2309.00071).
    - llama3: the same between 1 and 4 turns, and the share falls with the number of turns (Llama 3.1,
      arXiv:2407.21783).
    """
    dim, theta, factor, original = (
        config.head_dim,
        config.rope_theta,
        config.rope_factor,
        config.rope_original_max_seq_len,
    )
    pairs = torch.arange(0, dim, 2, dtype=torch.float64)
    plain = theta ** -(pairs / dim)
    if config.rope_scaling == "none":
        return plain
    if config.rope_scaling == "linear":
        return plain / factor
    if config.rope_scaling == "llama3":
        turns = original * plain / (2 * math.pi)
        kept = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    else:

        def pair_that_turns(times: float) -> float:
            return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_that_turns(32.0)), 0)
        last = min(math.ceil(pair_that_turns(1.0)), dim - 1)
        kept = 1.0 - ((pairs / 2 - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
    return plain * kept + plain / factor * (1.0 - kept)
