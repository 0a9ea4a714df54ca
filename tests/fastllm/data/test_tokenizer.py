from __future__ import annotations

import io
import itertools
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from fastllm import console
from fastllm.data import progress as progress_module
from fastllm.data import tokenizer as tokenizer_module
from fastllm.data.pieces import Cutter
from fastllm.data.progress import Progress, progress
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer, _sample
from fastllm.errors import UserError
from tests.limits import HANG

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


@pytest.mark.parametrize("size", [0, 1, 256, -5])
def test_a_vocabulary_without_all_bytes(size):
    with pytest.raises(UserError, match=f"at least 257 tokens .*, not {size}"):
        Tokenizer.train([TEXT], size)


def test_the_vocabulary_is_no_larger_than_the_text():
    assert Tokenizer.train(["ab"], 10**15).vocab_size == 258
    assert Tokenizer.train([], 1000).vocab_size == 257


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(UserError, match=r"lone surrogate, '\\udcff'"):
        Tokenizer.train(["a\udcff"], 300)


def test_of_very_many_words_a_sample_is_used(monkeypatch):
    texts = [f"{i * 7919 % 10_007} word{i} " * 20 for i in range(2000)]
    taken: list[str] = []
    bar, events = Progress("", 0, None), (threading.Event(), threading.Event())
    monkeypatch.setattr(tokenizer_module, "TRAINING_WORDS", 1000)
    for piece in _sample(texts, Cutter(Tokenizer.train([TEXT], 300).backend), bar, *events):
        taken.append(piece)
    places = sorted(texts.index(piece) for piece in taken)
    assert 50 < len(places) < 200
    assert max(b - a for a, b in itertools.pairwise([0, *places, 2000])) < 3 * 2000 / len(places)  # evenly spaced
    monkeypatch.setattr(tokenizer_module, "TRAINING_WORDS", 10**9)
    assert sorted(_sample(texts, Cutter(Tokenizer.train([TEXT], 300).backend), bar, *events)) == sorted(texts)


@pytest.mark.parametrize("phase", ["words", "merges"])
def test_ctrl_c_ends_training_inside_the_library(phase):
    """The library is busy for minutes with this text, and does not look for signals."""
    code = f"""
import random, sys
from fastllm.data import progress
from fastllm.data.tokenizer import Tokenizer
letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3_000_000)
enter = progress.Progress.enter
progress.Progress.enter = lambda *args: (enter(*args), print("ready", flush=True))
try:
    if {phase!r} == "words":
        print("ready", flush=True)
    Tokenizer.train(["".join(letters)], 100_000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # too early or too late is the same: the outcome may not depend on the moment
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANG)[0].endswith("interrupted\n")
    assert process.returncode == 7


def test_progress_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "QUIET", 0.0)
    with progress("encoding", 200) as bar:
        bar.advance(50)
        bar.enter("merges")
        bar.advance()
    assert re.fullmatch(r" +encoding: 25 % after 0 s\n +merges: after 0 s\n", capsys.readouterr().out)


def test_progress_on_a_terminal(monkeypatch):
    terminal = Console(force_terminal=True, file=io.StringIO(), width=80)
    monkeypatch.setattr(console, "console", terminal)
    with progress("encoding", 200) as bar:
        bar.advance(50)
    assert "encoding" in terminal.file.getvalue()  # type: ignore[attr-defined]
    terminal.quiet = True
    before = terminal.file.getvalue()  # type: ignore[attr-defined]
    with progress("encoding", 200) as bar:
        bar.advance(50)
    assert terminal.file.getvalue() == before  # type: ignore[attr-defined]
