"""Rank files of tiktoken: the ids are tiktoken's own."""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public as openai
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastllm.data.tiktoken_file import PATTERNS, convert_tiktoken, read_ranks
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer
from fastllm.errors import UserError
from tests.fastllm.data.test_pieces import TEXT, texts, trained_with

MORE = (
    TEXT
    + Path(argparse.__file__).read_text()[:60_000]
    + "aaaaaaa aaaa abababab 'S it's IT'S iPhone XMLHttp 日本語テキスト 12345678 //// \n\n\n   \n//\n" * 20
)


def ranks_of(pattern: str) -> dict[bytes, int]:
    trained = trained_with(PATTERNS[pattern], text=MORE, vocab_size=1500)
    tokens = [trained.token_bytes(t) for t in range(1, trained.vocab_size)]
    assert len(tokens) > 1000
    return {token: rank for rank, token in enumerate(tokens)}


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def theirs(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        split = getattr(openai, f"{pattern}_base")()["pat_str"]
    return tiktoken.Encoding(pattern, pat_str=split, mergeable_ranks=ranks, special_tokens={EOS_TOKEN: len(ranks)})


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, tiktoken.Encoding]:
    ranks = ranks_of(request.param)
    path = write(tmp_path_factory.mktemp("ranks") / f"{request.param}.tiktoken", ranks)
    assert read_ranks(path) == ranks
    return convert_tiktoken(path, request.param), theirs(request.param, ranks)


@settings(deadline=None, max_examples=150)
@given(texts)
@example(MORE * 3)
@example("'ſ 'LL DON'T x'ſ ⅧⅨ ½½½ 1234567890 ٣٣٣٣")
@example(" \n \r\n\t\n  \x85 \u2028 \u3000  a")
@example(EOS_TOKEN)
def test_ids_are_those_of_tiktoken(pair, text):
    ours, their = pair
    ids = their.encode_ordinary(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text == their.decode(ids)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(["ab", "abc", "aA", "a "]))
def test_any_order_of_ranks(tmp_path_factory, data, letters):
    """Tokens that no training made: a token joins wherever it is found, whatever pair it is found as."""
    words = data.draw(st.lists(st.text(letters, min_size=2, max_size=5), max_size=25, unique=True))
    order = data.draw(st.permutations([bytes([b]) for b in range(256)]))
    ranks = {token: rank for rank, token in enumerate([*order, *(word.encode() for word in words)])}
    path = write(tmp_path_factory.mktemp("ranks") / "x.tiktoken", ranks)
    text = data.draw(st.text(letters, max_size=60))
    assert convert_tiktoken(path, "cl100k").encode(text) == theirs("cl100k", ranks).encode_ordinary(text)


def test_a_converted_tokenizer_is_a_file(pair, tmp_path):
    ours, their = pair
    ours.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.eos_id == their.eot_token == their.max_token_value
    assert loaded.vocab_size == their.n_vocab
    assert loaded.encode(MORE) == their.encode_ordinary(MORE)
    long = MORE * 9
    assert loaded.encode(long) == their.encode_ordinary(long)
    assert len(list(loaded._cutter.cut(long))) > 10
    assert [loaded.token_bytes(t) for t in range(their.n_vocab - 1)] == [
        their.decode_single_token_bytes(t) for t in range(their.n_vocab - 1)
    ]


def test_special_tokens(tmp_path):
    ranks = ranks_of("cl100k")
    path = write(tmp_path / "x.tiktoken", ranks)
    special = {EOS_TOKEN: len(ranks) + 5, "<|x|>": len(ranks) + 2}
    found = convert_tiktoken(path, "cl100k", special)
    found.save(tmp_path / "tokenizer.json")
    for tokenizer in (found, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert tokenizer.eos_id == len(ranks) + 5
        assert tokenizer.vocab_size == len(ranks) + 6
        assert tokenizer.decode([len(ranks) + 2]) == "<|x|>"
        assert tokenizer.token_bytes(len(ranks) + 3) == b""
        assert tokenizer.decode(tokenizer.encode("<|x|>")) == "<|x|>"
        assert max(tokenizer.encode("<|x|>")) < len(ranks)
    with pytest.raises(UserError, match=r"the special token <\|x\|> has the id 7 of another token"):
        convert_tiktoken(path, "cl100k", {EOS_TOKEN: len(ranks), "<|x|>": 7})


BYTES = {bytes([b]): b for b in range(256)}
LINES = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in BYTES.items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no token for the byte 0"),
        (LINES.replace(b"YQ== 97\n", b""), "no token for the byte 97"),
        (LINES + b"YWI=\n", "line 257, is not a token"),
        (LINES + b"YWI= x\n", "line 257, is not a token"),
        (LINES + b"Y#I= 300\n", "line 257, is not a token"),
        (LINES + b"YWI= -1\n", "line 257: .* rank -1"),
        (LINES + b"YWI= 97\n", "line 257: .* rank 97"),
        (LINES + b"YQ== 300\n", "line 257: .* rank 300"),
        (LINES + b"YWI= 99999999\n", "line 257: .* rank 99999999"),
        (LINES + base64.b64encode(b"a" * 600) + b" 256\n", "line 257: .* can't be used"),
        (b'{"model": {}}', "line 1, is not a token"),
    ],
)
def test_no_rank_file(content, words, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        convert_tiktoken(tmp_path / "x.tiktoken", "r50k")
    assert str(tmp_path / "x.tiktoken") in str(error.value)


def test_no_pattern(tmp_path):
    with pytest.raises(UserError, match="no pattern 'cl100'; did you mean 'cl100k'"):
        convert_tiktoken(tmp_path / "x", "cl100")
