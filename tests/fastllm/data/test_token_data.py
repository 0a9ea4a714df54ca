"""Folders of tokens as one row, and the validation split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastllm.data.token_data import Documents, Split, TokenData, split
from fastllm.data.token_shards import document_key, write_tokens
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError

TEXTS = [f"document {i} " + "word " * (5 + i % 30) for i in range(100)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def write(folder: Path, tokenizer: Tokenizer, texts: list[str], source: str = "text", **options: Any) -> Path:
    with write_tokens(folder, tokenizer, **options) as writer:
        for text in texts:
            writer.add(np.array(tokenizer.encode(text)), source, document_key(text))
    return folder


def texts_of(data: TokenData, documents: Documents) -> list[str]:
    spans = zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True)
    ids = [data.read(start, start + length).tolist() for start, length in spans]
    assert all(row[-1] == data.eos_id for row in ids)
    return [data.tokenizer.decode(row[:-1]) for row in ids]


def test_several_folders_are_one_row(tokenizer, tmp_path):
    write(tmp_path / "a", tokenizer, TEXTS[:40], "a", shard_tokens=100)
    write(tmp_path / "b", tokenizer, TEXTS[40:], "b")
    write(tmp_path / "c", tokenizer, TEXTS[:5], "a")
    data = TokenData([tmp_path / name for name in "abc"])
    assert texts_of(data, data.documents) == [*TEXTS, *TEXTS[:5]]
    assert data.sources == ["a", "b"]
    assert data.source.tolist() == [0] * 40 + [1] * 60 + [0] * 5
    assert data.keys.tolist() == [document_key(text) for text in [*TEXTS, *TEXTS[:5]]]
    assert data.checksum != TokenData([tmp_path / name for name in "acb"]).checksum
    data.verify(0, 1)


def test_another_tokenizer(tokenizer, tmp_path):
    write(tmp_path / "a", tokenizer, TEXTS)
    write(tmp_path / "b", Tokenizer.train(TEXTS[:3], 290), TEXTS)
    with pytest.raises(UserError, match=r"b has another tokenizer than .*a: tokenize both with the same"):
        TokenData([tmp_path / "a", tmp_path / "b"])


def made_of(lengths: list[int], keys: list[int]) -> Any:
    sizes = np.array(lengths, np.uint32)
    documents = Documents(np.cumsum(sizes, dtype=np.int64) - sizes, sizes)
    return SimpleNamespace(
        documents=documents, keys=np.array(keys, np.uint64), source=np.arange(len(lengths), dtype=np.uint32)
    )


def held_out(parts: Split) -> set[int]:
    return set(parts.validation.starts.tolist())


RNG = np.random.default_rng()


def random_keys(n: int) -> list[int]:
    return RNG.integers(0, 2**64, n, np.uint64).tolist()


def test_the_split_is_by_the_hash_of_the_file_and_stays_when_data_is_added():
    keys = random_keys(4000)
    before = split(made_of([10] * 2000, keys[:2000]), 0.1, 20)
    after = split(made_of([10] * 4000, keys), 0.1, 20)
    assert held_out(before) == {10 * i for i in range(2000) if keys[i] < 0.1 * 2**64}
    assert held_out(before) == {start for start in held_out(after) if start < 20_000}
    assert len(before.train.lengths) + len(before.validation.lengths) == 2000
    assert (before.train_source == before.train.starts // 10).all()


def test_documents_of_a_file_stay_together():
    file = RNG.integers(0, 2**32, 300).tolist()
    keys = [f << 32 | own for f in file for own in RNG.integers(0, 2**32, 10).tolist()]
    chosen = {start // 100 for start in held_out(split(made_of([10] * 3000, keys), 0.1, 20))}
    assert chosen == {i for i, f in enumerate(file) if f < 0.1 * 2**32}


@pytest.mark.parametrize("file", [0, 2**32 - 1])
def test_one_file_is_parted_by_document(file):
    """Whether its hash is below the share or not."""
    own = RNG.permutation(1000).tolist()
    parts = split(made_of([10] * 1000, [file << 32 | k for k in own]), 0.1, 20)
    assert held_out(parts) == {10 * i for i, k in enumerate(own) if k < 100}


def test_one_document_is_parted_at_its_end():
    parts = split(made_of([1000], [2**64 - 1]), 0.1, 20)
    assert [a.tolist() for a in (*parts.train, *parts.validation)] == [[0], [900], [900], [100]]
    parts = split(made_of([1000], [0]), 0.1, 200)  # at least a sequence
    assert [a.tolist() for a in (*parts.train, *parts.validation)] == [[0], [800], [800], [200]]


def test_a_file_that_is_too_long_is_not_held_out():
    keys = [0, *(2**63 + i for i in range(9))]
    parts = split(made_of([5000, *[1000] * 9], keys), 0.1, 20)
    assert parts.validation.tokens == 1000
    assert 0 not in held_out(parts)


def test_the_same_for_several_shares_of_few_tokens():
    for share in (0.01, 0.05, 0.3):
        lengths = RNG.integers(1, 400, 50).tolist()
        parts = split(made_of(lengths, random_keys(50)), share, 16)
        wanted = max(int(share * sum(lengths)), 16)
        assert wanted / 2 <= parts.validation.tokens <= 2 * wanted
        assert parts.validation.tokens + parts.train.tokens == sum(lengths)
