"""Folders of tokens: what is written is read, and every damage is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.data import token_shards
from fastllm.data.token_shards import DOCUMENT, TokenFolder, document_key, dtype_of, write_tokens
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError

TEXTS = [f"document {i} " + "of some words, more or less. " * (i % 7) for i in range(100)]
SOURCES = ["web" if i % 3 else "books" for i in range(100)]
TOKENIZER = Tokenizer.train(TEXTS, 300)


def write(folder: Path, shard_tokens: int = 500, tokenizer: Tokenizer = TOKENIZER) -> TokenFolder:
    with write_tokens(folder, tokenizer, shard_tokens) as writer:
        for text, source, ids in zip(TEXTS, SOURCES, tokenizer.encode_batch(TEXTS), strict=True):
            writer.add(ids, source, document_key(text))
    return TokenFolder(folder)


@pytest.fixture(scope="module", params=[500, 10**9], ids=["several shards", "one shard"])
def folder(request, tmp_path_factory) -> TokenFolder:
    found = write(tmp_path_factory.mktemp("tokens") / "tokens", request.param)
    assert (len(found.shards) > 3) == (request.param == 500)
    return found


def test_what_is_written_is_read(folder):
    rows = [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in TEXTS]
    assert folder.read(0, folder.tokens).tolist() == [i for row in rows for i in row]
    assert folder.lengths.tolist() == [len(row) for row in rows]
    assert folder.starts.tolist() == [0, *np.cumsum([len(row) for row in rows])[:-1]]
    assert [folder.sources[number] for number in folder.source] == SOURCES
    assert folder.keys.tolist() == [document_key(text) for text in TEXTS]
    assert folder.documents == 100
    assert folder.dtype == np.uint16
    assert (folder.lengths.dtype, folder.keys.dtype, folder.starts.dtype) == (np.uint32, np.uint64, np.int64)
    assert folder.eos_id == TOKENIZER.eos_id
    assert folder.vocab_size == TOKENIZER.vocab_size
    assert folder.fingerprint == folder.tokenizer.fingerprint == TOKENIZER.fingerprint
    folder.verify()


def test_any_span_can_be_read(folder):
    row, rng = folder.read(0, folder.tokens), np.random.default_rng()
    spans = np.sort(rng.integers(0, folder.tokens + 1, (200, 2)))
    for start, stop in spans:
        assert folder.read(start, stop).tolist() == row[start:stop].tolist()
    gathered = folder.gather(spans[:, 0], spans[:, 1] - spans[:, 0])
    assert gathered.dtype == folder.dtype
    assert gathered.tolist() == np.concatenate([row[start:stop] for start, stop in spans]).tolist()
    assert folder.gather([], []).size == folder.read(5, 5).size == 0
    for start, stop in ((-1, 3), (3, 2), (0, folder.tokens + 1)):
        with pytest.raises(IndexError):
            folder.read(start, stop)


def test_shards_are_closed_to_spare_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "OPEN_SHARDS", 2)
    found = write(tmp_path / "tokens", 200)
    before = len(os.listdir("/proc/self/fd"))
    assert found.read(0, found.tokens).size == found.tokens
    found.lengths, found.keys  # noqa: B018
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(found.shards) > 4


def test_documents_are_numpy_files_too(folder):
    tables = [np.load(folder.path / f"{shard.name}.documents.npy") for shard in folder.shards]
    assert all(table.dtype == DOCUMENT for table in tables)
    assert np.concatenate(tables)["length"].tolist() == folder.lengths.tolist()


def test_the_checksum_stands_for_the_content(tmp_path):
    assert write(tmp_path / "a").checksum == write(tmp_path / "b").checksum
    assert write(tmp_path / "c", 900).checksum != TokenFolder(tmp_path / "a").checksum
    shutil.move(tmp_path / "a", tmp_path / "d")
    assert TokenFolder(tmp_path / "d").checksum == TokenFolder(tmp_path / "b").checksum


def test_keys():
    key = document_key("some text")
    assert 0 <= key < 2**64
    assert document_key("some text") == key != document_key("some text ")
    grouped, other = document_key("some text", "00ff"), document_key("other text", "00ff")
    assert grouped >> 32 == other >> 32 != key >> 32
    assert grouped & 0xFFFFFFFF == key & 0xFFFFFFFF != other & 0xFFFFFFFF
    high = [document_key(str(i)) >> 32 for i in range(2000)]
    assert 0.4 < np.mean(np.array(high) < 2**31) < 0.6


class LargeVocabulary:
    """Stands for a tokenizer of so many tokens."""

    eos_id, fingerprint = 7, "f"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def save(self, path: Path) -> None:
        TOKENIZER.save(path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_dtype_holds_the_last_id(vocab_size, dtype, tmp_path):
    assert dtype_of(vocab_size) == dtype
    ids = np.array([3, vocab_size - 1, 0], np.uint32)
    with write_tokens(tmp_path / "tokens", LargeVocabulary(vocab_size)) as writer:  # type: ignore[arg-type]
        writer.add(ids, "web", 1)
        with pytest.raises(ValueError, match=f"token {vocab_size} of a vocabulary of {vocab_size}"):
            writer.add(ids + 1, "web", 1)
    folder = TokenFolder(tmp_path / "tokens")
    assert folder.dtype == dtype
    assert folder.read(0, 4).tolist() == [*ids, 7]


def test_documents_without_tokens(tmp_path):
    with write_tokens(tmp_path / "tokens", TOKENIZER) as writer:
        writer.add(np.empty(0, np.uint32), "web", 1)
        writer.add(np.array([5]), "web", 1)
    assert writer.empty == 1
    assert TokenFolder(tmp_path / "tokens").lengths.tolist() == [2]
    with pytest.raises(UserError, match="no document with text"), write_tokens(tmp_path / "none", TOKENIZER):
        pass
    assert os.listdir(tmp_path) == ["tokens"]


def change(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return apply


def flip(place: int, bits: int = 1) -> Callable[[bytes], bytes]:
    return lambda b: b[:place] + bytes([b[place] ^ bits]) + b[place + 1 :]


def edit_index(**changes: Any) -> Callable[[bytes], bytes]:
    """An index with other values and the right checksum."""

    def edit(content: bytes) -> bytes:
        index = json.loads(content) | changes
        return json.dumps(index | {"checksum": token_shards._checksum(index)}).encode()

    return edit


def swap(suffix: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        first, second = (folder / f"0000{i}.{suffix}" for i in (1, 2))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (lambda f: shutil.rmtree(f), "tokens", "there is no such folder"),
        (lambda f: (f / "index.json").unlink(), "tokens", "no folder of tokens"),
        (change("index.json", b"{"), "index.json", "not valid JSON"),
        (change("index.json", edit_index(version=2)), "index.json", "of version 2, and this fastllm reads version 1"),
        (change("index.json", lambda b: b.replace(b'"web"', b'"wob"')), "index.json", "its checksum is wrong"),
        (change("index.json", edit_index(shards=[{}])), "index.json", "shards must be a list of shards"),
        (change("index.json", edit_index(shards=[])), "tokens", "holds no tokens"),
        (change("index.json", edit_index(dtype="<u4")), "index.json", "uint32 is not the dtype"),
        (change("index.json", edit_index(eos_id=300)), "index.json", "eos_id must be"),
        (change("00001.tokens", lambda b: b[:-1]), "00001.tokens", "bytes, and .* by index"),
        (change("00001.tokens", lambda b: b + b"\0\0"), "00001.tokens", "bytes, and .* by index"),
        (change("00001.documents.npy", lambda b: b[:-1]), "00001.documents.npy", "bytes, and .* by index"),
        (lambda f: (f / "00002.tokens").unlink(), "00002.tokens", "No such file"),
        (lambda f: (f / "00002.documents.npy").unlink(), "00002.documents.npy", "No such file"),
    ],
)
def test_damage_that_opening_finds(damage, file, words, tmp_path):
    write(tmp_path / "tokens")
    damage(tmp_path / "tokens")
    with pytest.raises(UserError, match=words) as error:
        TokenFolder(tmp_path / "tokens")
    assert f"{file}" in str(error.value)
    assert "\n" not in str(error.value)


OTHER = Tokenizer.train(["other words than those " * 9], 300)


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (change("00001.tokens", flip(100)), "00001.tokens", "SHA-256"),
        (change("00001.tokens", flip(101, 128)), "00001.tokens", r"token 50 is 3\d{4}, out of range"),
        (change("00001.tokens", lambda b: b[:-2] + b"\1\0"), "00001.tokens", "does not end with the token 0"),
        (swap("tokens"), "00001.", "damaged"),
        (swap("documents.npy"), "00001.", "damaged"),
        (change("00001.documents.npy", flip(20)), "00001.documents.npy", "header"),
        (change("00001.documents.npy", flip(128)), "00001.documents.npy", "SHA-256"),
        (change("00001.documents.npy", flip(136)), "00001.documents.npy", "have not the"),
        (change("00001.documents.npy", flip(143, 128)), "00001.documents.npy", "is of source 2147483648|is of source"),
        (change("tokenizer.json", b"{}"), "tokenizer.json", "not a tokenizer"),
        (lambda f: OTHER.save(f / "tokenizer.json"), "tokenizer.json", "is not the tokenizer that the shards"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", "No such file"),
    ],
)
def test_damage_that_verification_finds(damage, file, words, tmp_path):
    folder = write(tmp_path / "tokens").path
    copy = tmp_path / "intact"
    shutil.copytree(folder, copy)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        TokenFolder(folder).verify()
    assert str(folder / file) in str(error.value)
    TokenFolder(copy).verify()


def test_each_part_verifies_its_own_shards(tmp_path):
    folder = write(tmp_path / "tokens")
    change("00001.tokens", flip(100))(folder.path)
    folder.verify(0, 2)
    with pytest.raises(UserError, match=r"00001\.tokens is damaged"):
        folder.verify(1, 2)


def test_arrays_by_document_are_checked_without_verification(tmp_path):
    """Lengths that are too large would lead outside of the shards."""
    folder = write(tmp_path / "tokens")
    change("00001.documents.npy", flip(138))(folder.path)
    with pytest.raises(UserError, match=r"00001\.documents\.npy is damaged"):
        folder.lengths  # noqa: B018


def test_a_full_disk(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.file.close()

    real = token_shards.ShardWriter.__init__

    def full(self: Any, *args: Any) -> None:
        real(self, *args)
        self._file = Full(self._file)

    monkeypatch.setattr(token_shards.ShardWriter, "__init__", full)
    with pytest.raises(UserError, match=r"can't write .*00000\.tokens: No space left on device"):
        write(tmp_path / "tokens")
    assert os.listdir(tmp_path) == []


def test_an_error_in_between_leaves_nothing(tmp_path):
    def stop() -> None:
        with write_tokens(tmp_path / "tokens", TOKENIZER) as writer:
            writer.add(np.array([5]), "web", 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    assert os.listdir(tmp_path) == []
