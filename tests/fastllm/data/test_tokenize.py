"""From a corpus to tokens: the same ones however many processes encode, and whatever interrupts them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.data import token_shards
from fastllm.data import tokenize as tokenize_module
from fastllm.data.token_shards import TokenFolder, document_key
from fastllm.data.tokenize import tokenize
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer
from fastllm.errors import UserError
from tests.fastllm.data.corpora import write_corpus
from tests.limits import HANG

SHARDS = [
    [
        {
            "text": f"document {i} of shard {n}, {EOS_TOKEN} " + "naïve words, 日本語 and\n\n12345 numbers. " * (i % 9),
            "source": ("web", "books", "wiki")[(i + n) % 3],
        }
        for i in range(60)
    ]
    for n in range(5)
]
DOCUMENTS = [document for shard in SHARDS for document in shard]
TOKENIZER = Tokenizer.train([document["text"] for document in DOCUMENTS], 400)


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus", SHARDS)


@pytest.fixture(autouse=True)
def a_task_for_each_shard(monkeypatch):
    monkeypatch.setattr(tokenize_module, "TASK_LIMIT", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_become_tokens(corpus, tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    done = tokenize(corpus, tmp_path / "tokenizer.json", tmp_path / "tokens", processes=1)
    folder = TokenFolder(tmp_path / "tokens")
    folder.verify()
    rows = [[*TOKENIZER.encode(document["text"]), TOKENIZER.eos_id] for document in DOCUMENTS]
    assert folder.read(0, folder.tokens).tolist() == [i for row in rows for i in row]
    assert folder.lengths.tolist() == [len(row) for row in rows]
    assert [folder.sources[n] for n in folder.source] == [document["source"] for document in DOCUMENTS]
    assert folder.keys.tolist() == [document_key(document["text"]) for document in DOCUMENTS]
    assert done == tokenize_module.Tokenized(len(DOCUMENTS), folder.tokens, 0)
    assert len(folder.shards) == 5
    names = {"index.json", "tokenizer.json", *(f"0000{n}.{s}" for n in range(5) for s in ("tokens", "documents.npy"))}
    assert set(os.listdir(tmp_path / "tokens")) == names


def test_processes_change_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "ALONE", 1)
    for processes in (1, 3):
        tokenize(corpus, TOKENIZER, tmp_path / f"tokens{processes}", processes, shard_tokens=1000)
    assert contents(tmp_path / "tokens1") == contents(tmp_path / "tokens3")
    assert len(TokenFolder(tmp_path / "tokens1").shards) > 5


def test_large_shards_of_tokens_of_small_ones_of_a_corpus(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "TASK_LIMIT", 2**28)
    monkeypatch.setattr(tokenize_module, "TASKS", 2)
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert len(TokenFolder(tmp_path / "tokens").shards) == 2
    tokenize(corpus, TOKENIZER, tmp_path / "single", shard_tokens=10)
    assert len(TokenFolder(tmp_path / "single").shards) == len(DOCUMENTS)
    first, second = TokenFolder(tmp_path / "tokens"), TokenFolder(tmp_path / "single")
    assert np.array_equal(first.read(0, first.tokens), second.read(0, second.tokens))


def test_documents_of_one_file_share_the_high_bits(tmp_path):
    texts = [{"text": "one", "group": "ab"}, {"text": "two", "group": "ab"}, {"text": "one"}]
    tokenize(write_corpus(tmp_path / "corpus", [texts]), TOKENIZER, tmp_path / "tokens")
    keys = TokenFolder(tmp_path / "tokens").keys
    high, low = keys >> np.uint64(32), keys & np.uint64(2**32 - 1)
    assert high[0] == high[1] != high[2]
    assert low[0] == low[2] != low[1]


def test_empty_documents_and_shards(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [[{"text": ""}], [], [{"text": "a"}, {"text": ""}, {"text": "b"}]])
    assert tokenize(corpus, TOKENIZER, tmp_path / "tokens") == tokenize_module.Tokenized(2, 4, 2)
    assert tokenize(corpus, TOKENIZER, tmp_path / "tokens") == tokenize_module.Tokenized(2, 4, 2)  # as it was told
    for number, shards in enumerate(([], [[]], [[{"text": ""}]])):
        empty = write_corpus(tmp_path / f"empty{number}", shards)
        with pytest.raises(UserError, match="there is no document with text"):
            tokenize(empty, TOKENIZER, tmp_path / "none")
        shutil.rmtree(tmp_path / "none", ignore_errors=True)


def test_what_is_finished_is_not_done_again(corpus, tmp_path, monkeypatch, capsys):
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    before = contents(tmp_path / "tokens")
    monkeypatch.setattr(tokenize_module, "_encode", None)
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert "is complete already" in capsys.readouterr().out
    assert contents(tmp_path / "tokens") == before


def test_killed_at_the_beginning_or_the_end(corpus, tmp_path):
    (tmp_path / "tokens" / "work").mkdir(parents=True)
    (tmp_path / "tokens" / "run.lock").touch()
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    (tmp_path / "tokens" / "work").mkdir()
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "work").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_rerun_with_other_input(finished, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(tokenize_module, "write_index", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tokenize(corpus, TOKENIZER, tmp_path / "tokens")
        else:
            tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    other = write_corpus(tmp_path / "other", [*SHARDS[:4], SHARDS[4][:-1]])
    with pytest.raises(UserError, match="was made with another corpus: choose another folder"):
        tokenize(other, TOKENIZER, tmp_path / "tokens")
    with pytest.raises(UserError, match="was made with another tokenizer: choose"):
        tokenize(corpus, Tokenizer.train([DOCUMENTS[0]["text"]], 300), tmp_path / "tokens")
    with pytest.raises(UserError, match="was made with another corpus and another shard_tokens: choose"):
        tokenize(other, TOKENIZER, tmp_path / "tokens", shard_tokens=100)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(UserError, match="full is not empty"):
        tokenize(corpus, TOKENIZER, tmp_path / "full")
    with pytest.raises(UserError, match="there is no corpus"):
        tokenize(tmp_path / "nowhere", TOKENIZER, tmp_path / "x")


def damage(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    return content


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_shard_stops_no_other(processes, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "ALONE", 1)
    tokenize(corpus, TOKENIZER, tmp_path / "right")
    intact = damage(corpus / "00001.jsonl.zst")
    with pytest.raises(UserError, match=r"00001\.jsonl\.zst is (damaged|truncated).*the rest is encoded"):
        tokenize(corpus, TOKENIZER, tmp_path / "tokens", processes)
    assert sorted(path.name for path in (tmp_path / "tokens").glob("*.tokens")) == [
        f"0000{n}.tokens" for n in (0, 2, 3, 4)
    ]
    assert not list((tmp_path / "tokens").glob(".*"))
    with pytest.raises(UserError, match="no folder of tokens"):
        TokenFolder(tmp_path / "tokens")
    (corpus / "00001.jsonl.zst").write_bytes(intact)
    written = (tmp_path / "tokens" / "00000.tokens").stat().st_mtime_ns
    tokenize(corpus, TOKENIZER, tmp_path / "tokens", processes)
    assert (tmp_path / "tokens" / "00000.tokens").stat().st_mtime_ns == written
    assert contents(tmp_path / "tokens") == contents(tmp_path / "right")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "is no document: Expecting"),
        (b"7", "is no document"),
        (b'{"source": "web"}', "is no document: its text is None"),
        (b'{"text": "a"}', "is no document: its source is None"),
        (b'{"text": 7, "source": "web"}', "is no document: its text is 7"),
        (b'{"text": "a\xff", "source": "web"}', "is no document: 'utf-8' codec can't decode byte 0xff"),
        (b'{"text": "a\\udcff", "source": "web"}', "is no document: .* surrogates not allowed"),
        (b"[" * 100_000, "is no document: maximum recursion"),
    ],
)
def test_lines_that_are_no_documents(line, words, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [[{"text": "right"}, line]])
    with pytest.raises(UserError, match=rf"00000\.jsonl\.zst, line 2, {words}") as error:
        tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_full_disk(corpus, tmp_path, monkeypatch):
    real = token_shards.ShardWriter._write

    def write(self: Any, ids: np.ndarray) -> None:
        if self.name == "00003":
            with self._errors():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, ids)

    tokenize(corpus, TOKENIZER, tmp_path / "right")
    with monkeypatch.context() as patch:
        patch.setattr(token_shards.ShardWriter, "_write", write)
        with pytest.raises(UserError, match=r"can't write .*00003\.tokens: No space left on device; the rest"):
            tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "right")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle(processes, corpus, tmp_path):
    """A rerun writes what an undisturbed one does; the workers of a killed process end too."""
    TOKENIZER.save(tmp_path / "tokenizer.json")
    tokenize(corpus, TOKENIZER, tmp_path / "right")
    code = f"""
import os, time
import fastllm.data.tokenize as module
from fastllm.data.token_shards import ShardWriter
if __name__ != "__main__" or {processes} == 1:
    close = ShardWriter.close
    def slow(self):
        if self.name == "00003":
            print(os.getpid(), flush=True)
            time.sleep(1000)
        return close(self)
    ShardWriter.close = slow
module.TASK_LIMIT = module.ALONE = 1
if __name__ == "__main__":
    module.tokenize({str(corpus)!r}, {str(tmp_path / "tokenizer.json")!r}, {str(tmp_path / "tokens")!r}, {processes})
"""
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert list((tmp_path / "tokens").glob(".00003.tokens.*.part"))
    process.send_signal(signal.SIGKILL)
    process.wait(HANG)
    end = time.monotonic() + HANG
    while Path(f"/proc/{worker}/stat").exists() and ") Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "tokens" / "work" / "00000.json").exists()
    tokenize(corpus, TOKENIZER, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "right")
