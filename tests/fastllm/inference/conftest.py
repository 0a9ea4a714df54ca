from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm.config import ModelConfig
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.gpt import GPT

TEXT = "def f(x):\n    return x + 1\n" * 40


def random_gpt(vocab_size: int, **shape: Any) -> GPT:
    """A small model that says anything: all weights are random, those that init_weights zeroes too."""
    sizes: dict[str, Any] = {"max_seq_len": 128, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 96}
    model = GPT(ModelConfig(vocab_size=vocab_size, **(sizes | shape)))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300, chat=True)


@pytest.fixture(scope="session")
def gpt(tokenizer) -> GPT:
    return random_gpt(tokenizer.vocab_size)
