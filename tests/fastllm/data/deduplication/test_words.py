"""Words, their hashes, and signatures: what they depend on and what they don't."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.deduplication import MinHash, MinHashSettings, exact_duplicates, exact_key
from fastllm.data.deduplication.words import BLOCK, Words, ngram_hashes, shingles
from fastllm.errors import UserError
from tests.fastllm.data.deduplication.texts import ngrams_of, pieces, words_of


def cut(text: str) -> list[str]:
    words = Words(text)
    return [words.text(i, i) for i in range(len(words))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n", []),
        ("...", []),
        ("one", ["one"]),
        (" Don't, my_name! ", ["Don'", "t,", "my_", "name!"]),
        ("“a” — naïve…", ["a” —", "naïve…"]),
        ("日本語です。AI技術abc", ["日", "本", "語", "で", "す。", "AI", "技", "術", "abc"]),
        ("ที่ไหน", ["ที่", "ไห", "น"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("so😀good\U00020000", ["so", "😀", "good", "\U00020000"]),
        ("\u0301a", ["\u0301a"]),
        ("a\ud800b", ["a�b"]),
    ],
)
def test_words(text, words):
    assert cut(text) == words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World", "hello world"),
        ("hello “world”", "HELLO 'WORLD'"),
        ("caf\u00e9", "CAFE\u0301"),
        ("a\u00a0b\u3000c", "a b c"),
        ("中文 字", "中文字"),
    ],
)
def test_equal_hashes(one, other):
    assert np.array_equal(Words(one).hashes(), Words(other).hashes())


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_a_word_has_one_hash_wherever_it_stands(before, after):
    alone = Words("Straße").hashes()[0]
    hashes = Words(f"{before} straße {after}").hashes()
    assert alone in hashes
    assert len(hashes) == len(Words(before)) + 1 + len(Words(after))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["ab", "cd", "ef", "é", "漢", "x1"]), max_size=30), st.integers(1, 6))
def test_ngrams_are_equal_where_words_are(words, n):
    hashes = ngram_hashes(Words(" ".join(words)).hashes(), n).tolist()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


def test_no_collisions_in_real_texts():
    texts = pieces(300)
    assert len(np.unique(np.concatenate([Words(text).hashes() for text in texts]))) == len(
        {word for text in texts for word in words_of(text)}
    )
    assert len(np.unique(np.concatenate([shingles(text, 5) for text in texts]))) == len(
        {ngram for text in texts for ngram in ngrams_of(text)}
    )


def test_long_texts_are_hashed_in_blocks():
    words = [f"w{i * i % 99991}" for i in range(3 * BLOCK)]
    whole = Words(" ".join(words)).hashes()
    for i in (0, 1, BLOCK // 6, BLOCK - 2, 3 * BLOCK - 1):
        assert whole[i] == Words(words[i]).hashes()[0]
    ngrams = ngram_hashes(whole, 5)
    assert len(ngrams) == len(words) - 4
    for i in (0, BLOCK - 5, BLOCK - 4, BLOCK, len(ngrams) - 1):
        assert ngrams[i] == ngram_hashes(whole[i : i + 5], 5)[0]
    giant = Words("a " + "x" * (3 * BLOCK) + " b").hashes()
    assert giant.tolist() == [Words(word).hashes()[0] for word in ("a", "x" * BLOCK, "b")]


def test_pinned():
    """Signatures are kept in files: they must be the same in each version."""
    assert Words("Hello, Wörld 日本").hashes().tolist() == HASHES
    assert MinHash(MinHashSettings(bands=2, rows=2)).signature("The quick brown fox jumps over.").tolist() == VALUES


HASHES = [10425478601862923645, 8126483563038814046, 15820202360035892420, 15748233868194500043]
VALUES = [2870323851, 1709732762, 3601699310, 35585184]


def test_same_in_other_processes():
    code = "from fastllm.data.deduplication import MinHash; print(MinHash().signature('a b c d e f ü').tolist())"
    shown = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"))
    }
    assert shown == {f"{MinHash().signature('a b c d e f ü').tolist()}\n"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300), st.randoms())
def test_signatures_are_of_sets(hashes, draw):
    minhash = MinHash(MinHashSettings(bands=4, rows=4))
    again = hashes + draw.choices(hashes, k=5)
    draw.shuffle(again)
    one = minhash._values(np.array(hashes, np.uint64), 16, 1)
    assert np.array_equal(one, minhash._values(np.array(again, np.uint64), 16, 1))


def test_short_texts():
    minhash = MinHash()
    assert set(minhash.signature(" ... ").tolist()) == {0xFFFFFFFF}
    assert np.array_equal(minhash.signature("Two words"), minhash.signature("two  words!"))
    assert np.mean(minhash.signature("two words") == minhash.signature("two birds")) < 0.1
    assert np.mean(minhash.signature("two words") == minhash.signature("two words more")) < 0.1


def test_another_rensa_is_refused(monkeypatch):
    import rensa

    digest = rensa.RMinHash.digest_matrix_from_flat_token_hashes

    class Other:
        @staticmethod
        def digest_matrix_from_flat_token_hashes(hashes, offsets, count, seed):
            return digest(hashes, offsets, count, seed + 1)

    monkeypatch.setattr(rensa, "RMinHash", Other)
    with pytest.raises(UserError, match="rensa==0"):
        MinHash()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ngram": 0}, "ngram"),
        ({"bands": 2.0}, "bands"),
        ({"rows": True}, "rows"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "0.5"}, "threshold"),
        ({"seed": -1}, "seed"),
        ({"enabled": 1}, "enabled"),
    ],
)
def test_settings_are_checked(values, named):
    with pytest.raises(UserError, match=named):
        MinHashSettings(**values)


def test_exact_keys():
    assert exact_key(" a\u3000b\n\tc ") == exact_key("a b c")
    assert len({exact_key(text) for text in ("a b", "A b", "ab", "a, b", "", "\ud800")}) == 6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.binary(min_size=2, max_size=2), max_size=20), min_size=1, max_size=4))
def test_exact_duplicates(parts):
    """Keys that agree in most bytes, so that groups of equal beginnings hold several keys."""
    keys = [key for part in parts for key in part]
    arrays = [
        np.frombuffer(b"".join(bytes(7) + key[:1] + bytes(7) + key[1:] for key in part), np.uint8).reshape(-1, 16)
        for part in parts
    ]
    expected = [keys.index(key) if keys.index(key) < i else -1 for i, key in enumerate(keys)]
    assert exact_duplicates(arrays).tolist() == expected
