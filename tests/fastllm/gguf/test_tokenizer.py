"""Tokenizers of GGUF files, against transformers and the tokenizers that they were written of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

import fastllm
from fastllm.data.pieces import GPT2_SPLIT, SMOLLM_SPLIT
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError
from fastllm.gguf.header import read_header
from fastllm.gguf.tokenizer import SPLITS, read_tokenizer

from .files import CONFIGS, TOKENIZER, model_of, write

MODEL = model_of(CONFIGS["llama"])
TEXTS = [
    "", " ", "def add(a, b):\n    return a + b", "It's 1234567 o'clock, WE'LL  see\r\n\r\n  x",
    "é日本  ٣٤ 👩‍👩‍👧 \t\n ",
    "<|im_end|><|endoftext|> x<|im_start|>", "a  1   22 +=+ $3^", "...!!! --- ()[]", "\u00a0\u2003x 1\u00a02",
]  # fmt: skip


def made(folder: Path, **keys: Any) -> Tokenizer:
    return read_tokenizer(read_header(written(folder, **keys)))


def written(folder: Path, **keys: Any) -> Path:
    return write(folder / "m.gguf", MODEL, keys={f"tokenizer.ggml.{key}": value for key, value in keys.items()})


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "qwen2", "deepseek-r1-qwen", "gpt-4o"])
def test_as_transformers(pre, tmp_path):
    ours = made(tmp_path, pre=pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert ours.vocab_size == TOKENIZER.vocab_size == len(theirs)

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)))
    def check(text: str) -> None:
        assert ours.encode_with_special(text) == theirs(text)["input_ids"]
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text

    check()


def words(pre_tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


@settings(max_examples=2000, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n 12¾٣'sdtma.é")), max_size=40))
def test_single_digits_before_the_other_words(text):
    """SMOLLM_SPLIT is one pattern for two steps."""
    one = pre_tokenizers.Split(Regex(SMOLLM_SPLIT), "isolated")
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(GPT2_SPLIT), "isolated")
    assert words(one, text) == words(pre_tokenizers.Sequence([digits, rest]), text)


def test_the_default_splits(tmp_path):
    """llama.cpp's, where a file names no other: punctuation first, and digits in threes."""
    tokenizer = made(tmp_path, pre=None)
    text = "It's a test, (1234567) x == y"
    found = [text[a:b] for _, (a, b) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["It", "'", "s", " a", " test", ",", " ", "(", "123", "456", "7", ")", " x", " ", "==", " y"]
    assert found == expected
    assert made(tmp_path, pre="default").encode(text) == tokenizer.encode(text)


def test_bos_and_eos_around_a_text(tmp_path):
    bos, eos = TOKENIZER.eos_id, TOKENIZER.backend.token_to_id("<|im_end|>")
    plain = made(tmp_path, pre="gpt-2").encode("a b")
    for keys, expected in (
        ({"add_bos_token": True}, [bos, *plain]),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *plain, eos]),
        ({"add_bos_token": None}, plain),
    ):
        tokenizer = made(tmp_path, pre="gpt-2", **keys)
        assert tokenizer.encode("a b") == expected
        assert tokenizer.encode("a b", add_special_tokens=False) == tokenizer.encode_with_special("a b") == plain
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        assert theirs("a b")["input_ids"] == expected
    assert made(tmp_path, pre="llama-bpe", add_bos_token=None).encode("a b")[0] == bos  # as in llama.cpp


def test_tokens_that_end_an_answer(tmp_path):
    names = {name: TOKENIZER.backend.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "<|reserved_1|>")}
    end, text, other = names.values()
    assert made(tmp_path).eos_ids == (end, text)
    assert made(tmp_path, eos_token_id=text).eos_ids == (text, end)
    assert made(tmp_path, eot_token_id=other).eos_ids == (end, other, text)
    assert made(tmp_path, eom_token_id=other, eos_token_id=2**32 - 1).eos_ids == (other, end, text)


def test_tokens_of_the_user(tmp_path):
    """They are found in any text, and are no control tokens."""
    kinds = [3 if i in TOKENIZER.special_ids else 1 for i in range(TOKENIZER.vocab_size)]
    reserved = TOKENIZER.backend.token_to_id("<|reserved_1|>")
    kinds[reserved] = 4
    tokenizer = made(tmp_path, token_type=kinds)
    assert reserved not in tokenizer.special_ids
    assert tokenizer.encode("a<|reserved_1|>b<|im_end|>")[1] == reserved
    assert TOKENIZER.backend.token_to_id("<|im_end|>") not in tokenizer.encode("a<|reserved_1|>b<|im_end|>")


def test_without_kinds_the_named_tokens_are_special(tmp_path):
    tokenizer = made(tmp_path, token_type=None)
    assert tokenizer.special_ids == {TOKENIZER.eos_id, TOKENIZER.backend.token_to_id("<|im_end|>")}


def test_empty_tokens(tmp_path):
    """llama.cpp gives them names."""
    tokens = [TOKENIZER.backend.id_to_token(i) for i in range(TOKENIZER.vocab_size)]
    reserved = tokens.index("<|reserved_2|>")
    tokens[reserved] = ""
    assert made(tmp_path, tokens=tokens).backend.id_to_token(reserved) == f"[EMPTY_{reserved}]"


TOKENS = [TOKENIZER.backend.id_to_token(i) for i in range(TOKENIZER.vocab_size)]
SIZE = len(TOKENS)
MERGES = [" ".join(merge) for merge in json.loads(TOKENIZER.backend.to_str())["model"]["merges"]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "has no tokenizer: tokenizer.ggml.model is not there"),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'; fastllm reads gpt2"),
        ({"model": 7}, "tokenizer.ggml.model is 7"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon'; fastllm knows default, gpt-2,"),
        ({"pre": 7}, "tokenizer.ggml.pre must be a string"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list of strings"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens must be a list of strings"),
        ({"tokens": [*TOKENS, "b"]}, "tokenizer.ggml.tokens has 'b' twice"),
        ({"tokens": [*TOKENS, "new"], "token_type": None}, f"{SIZE + 1} tokens, but token_embd.weight is of {SIZE}"),
        ({"token_type": [1, 2]}, f"tokenizer.ggml.token_type must be {SIZE} whole numbers"),
        ({"token_type": "a"}, "tokenizer.ggml.token_type must be"),
        ({"merges": None}, "tokenizer.ggml.merges must be a list of strings"),
        ({"merges": ["abc"]}, "tokenizer.ggml.merges, number 0, is no pair: 'abc'"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges, number 0, is no pair: 'a b c'"),
        ({"merges": [*MERGES, "\u0120 qqq"]}, "is not a tokenizer"),
        ({"eos_token_id": SIZE}, f"tokenizer.ggml.eos_token_id must be a whole number from 0 to {SIZE - 1}"),
        ({"eos_token_id": "a"}, "tokenizer.ggml.eos_token_id must be a whole number"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but there is no bos_token_id"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token must be true or false"),
        ({"eos_token_id": None, "token_type": [1] * SIZE}, "tokenizer.ggml.eos_token_id is not there"),
    ],
)
def test_what_is_refused(keys, message, tmp_path):
    with pytest.raises(UserError) as raised:
        fastllm.load(written(tmp_path, **keys))
    assert message in str(raised.value) and str(tmp_path / "m.gguf") in str(raised.value)
    assert str(raised.value).isprintable()


def test_every_pattern_is_known_to_the_library():
    for patterns in SPLITS.values():
        for pattern in patterns:
            assert words(pre_tokenizers.Split(Regex(pattern), "isolated"), "a 1")
