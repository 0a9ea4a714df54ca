from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer
from fastllm.errors import UserError

TEXT = "def add(a, b):\n    return a + b\n\n\nfor i in range(100):\n    print(add(i, 1), 'naïve café')\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("")
@example(EOS_TOKEN)
@example(f"a{EOS_TOKEN}b <|endoftext|")
@example("e\u0301 \u00e9 \ufb01 \u212b")  # no normalisation
@example(" \t\r\n\r \u2028\x00")
@example("👩‍👩‍👧 日本語 العربية")
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_vocabulary(tokenizer):
    assert 257 < tokenizer.vocab_size <= 400
    assert {tokenizer.token_bytes(t) for t in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}
    assert tokenizer.decode([tokenizer.eos_id]) == EOS_TOKEN
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_batches_are_encoded_like_single_texts(tokenizer):
    texts = [TEXT[i : i + 37] for i in range(600)]
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(t) for t in texts]


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.decode(loaded.encode(f"x {EOS_TOKEN}")) == f"x {EOS_TOKEN}"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_wrong_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "wrong.json").write_text("{")
    with pytest.raises(UserError, match=r"wrong\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "wrong.json")
