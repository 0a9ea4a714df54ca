from __future__ import annotations

import copy

import pytest
import torch

from fastllm.inference import Engine
from fastllm.kernels import use_backend

from .conftest import TEXT

PROMPTS = [TEXT[:k] for k in (3, 40, 90, 60, 7)]


def answers(model, tokenizer, **options):
    engine = Engine(model, tokenizer, **options)
    found = engine.generate(PROMPTS, max_tokens=20, seed=1)
    return [(c.tokens, c.logprobs) for c in found], engine


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_replayed_steps_give_the_same_bits(quantize, gpt, tokenizer, monkeypatch):
    """Batches padded to their size, on memory that held another batch."""
    replayed, engine = answers(gpt, tokenizer, quantize=quantize)
    again = engine.generate(PROMPTS, max_tokens=20, seed=1)
    assert engine._model.replays > 0
    monkeypatch.setattr("fastllm.inference.graphs.SIZES", ())
    plain, engine = answers(gpt, tokenizer, quantize=quantize)
    assert engine._model.replays == 0
    assert replayed == plain == [(c.tokens, c.logprobs) for c in again]


def test_steps_that_other_backends_compute_are_not_replayed(gpt, tokenizer):
    """A recording would lack what PyTorch does."""
    with use_backend("torch"):
        _, engine = answers(gpt, tokenizer)
    assert engine._model.replays == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_give_the_same_bits(dtype, gpt, tokenizer, monkeypatch):
    model = copy.deepcopy(gpt).to("cuda", dtype)
    replayed, engine = answers(model, tokenizer, max_batch=3)
    assert engine._model.replays > 0
    monkeypatch.setattr("fastllm.inference.graphs.SIZES", ())
    assert replayed == answers(model, tokenizer, max_batch=3)[0]
