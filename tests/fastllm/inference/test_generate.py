from __future__ import annotations

import pytest
import torch

from fastllm.config import ModelConfig
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError
from fastllm.inference.generate import generate, heal_prompt, tokens_with_prefix
from fastllm.inference.sampling import SamplingParams, sample_token
from fastllm.model.gpt import GPT, TABLE_LENGTH
from fastllm.model.kv_cache import KVCache
from fastllm.model.rope import rotary_tables

TEXT = "def f(x):\n    return x + 1\n" * 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    """A model that knows TEXT by heart."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=32, dim=64, layers=2, heads=2, kv_heads=1, ffn_dim=96
    )
    model, ids = GPT(config), torch.tensor([tokenizer.encode(TEXT)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for start in [*range(40)] * 3:
        optimizer.zero_grad()
        model(ids[:, start : start + 32], ids[:, start + 1 : start + 33]).backward()
        optimizer.step()
    return model.eval()


def test_goes_on_beyond_the_context(model, tokenizer):
    text = "".join(generate(model, tokenizer, TEXT[:27], max_tokens=60, temperature=0))
    assert len(tokenizer.encode(text)) > 40  # more than the context holds
    assert TEXT[27:].startswith(text[:80])


def test_a_prompt_longer_than_the_context(model, tokenizer):
    prompt = TEXT[: 27 * 20]
    text = "".join(generate(model, tokenizer, prompt, max_tokens=10, temperature=0))
    assert TEXT.startswith(prompt + text)


def test_the_cache_is_no_longer_than_the_text(model, tokenizer, monkeypatch):
    """A context may be far longer than what is asked for."""
    caches = []
    monkeypatch.setattr(
        "fastllm.inference.generate.KVCache", lambda *args, **more: caches.append(KVCache(*args, **more)) or caches[-1]
    )
    list(generate(model, tokenizer, "def", max_tokens=3, temperature=0))
    (cache,) = caches
    assert cache.length <= cache.layers[0].k.shape[1] <= len(tokenizer.encode("def")) + 3


def test_a_space_at_the_end_of_the_prompt(model, tokenizer):
    text = "".join(generate(model, tokenizer, "def ", max_tokens=8, temperature=0))
    assert text.startswith("f(x)")


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    texts = ["".join(generate(model, tokenizer, "", max_tokens=20, temperature=2.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_characters_come_whole(tokenizer):
    """Untrained, the model makes bytes that are no UTF-8: each piece is a string all the same."""
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, dim=64, heads=2, kv_heads=1))
    pieces = list(generate(model, tokenizer, "é", max_tokens=100, temperature=3.0, top_k=0))
    assert "".join(pieces).encode()


def test_a_prompt_that_is_not_unicode(model, tokenizer):
    with pytest.raises(UserError, match="not valid UTF-8"):
        list(generate(model, tokenizer, "a\udcff"))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite(temperature, tokenizer):
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, dim=64, heads=2, kv_heads=1))
    for value in (float("nan"), float("inf"), 3e38):
        model.model.norm.weight.fill_(value)
        with pytest.raises(UserError, match="the model's logits are not finite"):
            list(generate(model, tokenizer, "def", max_tokens=3, temperature=temperature))


def test_a_space_at_the_end_where_no_token_begins_with_one():
    """As in Chinese: the prompt stays as it is."""
    tokenizer = Tokenizer.train(["你好世界天地人山水火" * 20], 300)
    assert tokens_with_prefix(tokenizer, b" ") == []
    ids = tokenizer.encode("你好 ")
    assert heal_prompt(tokenizer, ids) == (ids, None)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, dim=64, heads=2, kv_heads=1))
    for prompt in ("你好 ", " ", "", "  "):
        list(generate(model, tokenizer, prompt, max_tokens=3))


def test_a_tokenizer_of_another_model(model):
    larger = Tokenizer.train(["one two three four five six seven " * 40], 320)
    assert larger.vocab_size > model.config.vocab_size
    with pytest.raises(UserError, match=rf"token \d+ is not one of its {model.config.vocab_size}"):
        list(generate(model, larger, "one two three four five six seven", max_tokens=3))


def test_seeds(model, tokenizer):
    for seed in (0, 2**64 - 1):
        list(generate(model, tokenizer, "def", max_tokens=3, seed=seed))
    for seed in (-1, 2**64, 10**5000):
        with pytest.raises(UserError, match="the seed must be from 0 to"):
            list(generate(model, tokenizer, "def", max_tokens=3, seed=seed))


def test_absurd_lengths(tokenizer):
    """Memory is taken for the tokens that there are."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=2**30, dim=64, heads=2, kv_heads=1)
    model = GPT(config)
    pieces = generate(model, tokenizer, "def ", max_tokens=10**30)
    assert len([next(pieces) for _ in range(5)]) == 5
    assert len(model.model.cos) == TABLE_LENGTH


@torch.no_grad()
def test_caches_and_tables_grow(tokenizer, monkeypatch):
    monkeypatch.setattr("fastllm.model.gpt.TABLE_LENGTH", 4)
    monkeypatch.setattr("fastllm.model.kv_cache.FIRST_SIZE", 4)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, dim=64, heads=2, kv_heads=1)
    model, tokens = GPT(config), torch.arange(40, 72)[None]
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight)
    cache = KVCache(model)
    assert len(model.model.cos) == cache.layers[0].k.shape[1] == 4
    parts = [model(part, cache=cache) for part in tokens.split([3, 1, 1, 20, 7], 1)]
    assert cache.layers[0].k.shape[1] == len(model.model.cos) == 32
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))
    for table, whole in zip((model.model.cos, model.model.sin), rotary_tables(config), strict=True):
        assert torch.equal(table, whole)
    small = GPT(config)
    small(tokens[:, :5])
    assert len(small.model.cos) == 8
    small.init_weights(1)


def test_sample_token():
    logits, generator = torch.tensor([0.0, 3.0, 2.0, -1.0]), torch.Generator().manual_seed(0)

    def seen(**limits: float) -> set[int]:
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **limits}
        return {sample_token(logits, SamplingParams(**options), generator) for _ in range(500)}

    assert seen() == {0, 1, 2, 3}
    assert seen(temperature=0) == {1}
    assert seen(temperature=0.01) == {1}
    assert seen(temperature=1e-320) == {1}
    assert seen(temperature=float("inf")) == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 2}
    assert seen(top_k=9) == {0, 1, 2, 3}
    assert seen(top_p=0.5) == {1}
    assert seen(top_p=0.8) == {1, 2}
