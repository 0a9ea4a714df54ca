from __future__ import annotations

import copy

import pytest
import torch

from fastllm.inference import Engine
from fastllm.inference.graphs import StaticRows
from fastllm.inference.paged_gpt import PagedGPT

from .conftest import TEXT


def test_rows_of_no_sequence_change_nothing(gpt, tokenizer, monkeypatch):
    """What a graph would replay: batches padded to their size, on memory that held another batch."""
    plain = PagedGPT.__call__
    static: dict[int, StaticRows] = {}

    def padded(self, rows):
        if rows.prompts is not None or len(rows.decode) != 1:
            return plain(self, rows)
        mine = static.setdefault(8, StaticRows(8, 128 // 16, self.device))
        mine.fill(rows)
        return plain(self, mine.rows)[: len(rows.tokens)]

    prompts = [TEXT[:k] for k in (3, 40, 90, 60, 7)]
    expected = Engine(gpt, tokenizer).generate(prompts, max_tokens=20, seed=1)
    monkeypatch.setattr(PagedGPT, "__call__", padded)
    found = Engine(gpt, tokenizer).generate(prompts, max_tokens=20, seed=1)
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert [f.logprobs for f in found] == [e.logprobs for e in expected]
    assert static


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_give_the_same_tokens(dtype, gpt, tokenizer, monkeypatch):
    model = copy.deepcopy(gpt).to("cuda", dtype)
    prompts = [TEXT[:k] for k in (3, 40, 90, 60, 7)]
    found = Engine(model, tokenizer, max_batch=3).generate(prompts, max_tokens=30, seed=1)
    monkeypatch.setattr("fastllm.inference.graphs.SIZES", ())
    expected = Engine(model, tokenizer, max_batch=3).generate(prompts, max_tokens=30, seed=1)
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert [f.logprobs for f in found] == [e.logprobs for e in expected]
