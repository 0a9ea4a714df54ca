from __future__ import annotations

import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fastllm import console
from fastllm.data import progress as progress_module
from fastllm.data import tokenizer_sample
from fastllm.data.pieces import Cutter
from fastllm.data.progress import progress
from fastllm.data.tokenizer import CHAT_TOKENS, EOS_TOKEN, Tokenizer
from fastllm.data.tokenizer_sample import Sample
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


def saved(tokenizer: Tokenizer, path: Path, **changes: Any) -> Path:
    """The tokenizer's file with other values in its model (``model__dropout``) or at the top."""
    content = json.loads(tokenizer.backend.to_str())
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            content[part][inner] = value
        else:
            content[part] = value
    path.write_text(json.dumps(content))
    return path


def test_a_file_that_truncates_or_pads(tokenizer, tmp_path):
    """The settings of some earlier call are not obeyed, nor saved again."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in (TEXT, "a", ""):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert [list(ids) for ids in loaded.encode_batch([text, "b"])] == [tokenizer.encode(t) for t in (text, "b")]
    assert loaded.fingerprint == tokenizer.fingerprint
    loaded.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["truncation"] is None
    assert again["padding"] is None


def test_a_text_has_one_encoding(tokenizer, tmp_path):
    """Dropout of merges is for training."""
    loaded = Tokenizer.load(saved(tokenizer, tmp_path / "t.json", model__dropout=0.9))
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_fingerprint_is_of_vocabulary_and_merges(tokenizer, tmp_path):
    assert len(bytes.fromhex(tokenizer.fingerprint)) == 32
    model = json.loads(tokenizer.backend.to_str())["model"]
    merges, vocab = model["merges"], model["vocab"]
    assert len(merges) > 2

    def fingerprint(**changes: Any) -> str:
        return Tokenizer.load(saved(tokenizer, tmp_path / "t.json", **changes)).fingerprint

    assert fingerprint() == tokenizer.fingerprint
    assert fingerprint(model__merges=[" ".join(pair) for pair in merges]) == tokenizer.fingerprint  # older files
    assert fingerprint(model__vocab=dict(reversed(vocab.items()))) == tokenizer.fingerprint
    assert fingerprint(model__merges=[merges[1], merges[0], *merges[2:]]) != tokenizer.fingerprint
    swapped = vocab | {"a": vocab["b"], "b": vocab["a"]}
    assert fingerprint(model__vocab=swapped) != tokenizer.fingerprint
    assert Tokenizer.train(["other text " * 20], 300).fingerprint != tokenizer.fingerprint


def test_vocabularies_that_leave_ids_out(tokenizer, tmp_path):
    vocab = dict(json.loads(tokenizer.backend.to_str())["model"]["vocab"])
    vocab |= {"\u2603": 1000, "x\u2603": 1002}  # beyond the alphabet of bytes: text, as the library's decoder has it
    loaded = Tokenizer.load(saved(tokenizer, tmp_path / "t.json", model__vocab=vocab))
    assert loaded.vocab_size == 1003
    assert loaded.token_bytes(1001) == b""
    assert loaded.token_bytes(1002) == "x\u2603".encode()
    assert loaded.decode([1000]) == loaded.backend.decode([1000]) == "\u2603"
    assert len(loaded.byte_lengths()) == 1003


def test_other_names_of_the_end_of_a_text(tokenizer, tmp_path):
    content = tokenizer.backend.to_str()
    for name in ("<|end_of_text|>", "</s>"):
        (tmp_path / "t.json").write_text(content.replace(EOS_TOKEN, name))
        loaded = Tokenizer.load(tmp_path / "t.json")
        assert loaded.eos_id == tokenizer.eos_id
        assert loaded.decode([loaded.eos_id]) == name
    (tmp_path / "t.json").write_text(content.replace(EOS_TOKEN, "<|stop|>"))
    with pytest.raises(UserError, match=r"t\.json has no token <\|endoftext\|>, nor <\|end_of_text\|>, </s>"):
        Tokenizer.load(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json", eos_ids=(0,)).eos_id == 0


TEMPLATE = {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}  # fmt: skip
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], [EOS_TOKEN, -2.0]]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post_processor": TEMPLATE}, "is not a tokenizer: no entry found for key"),
        (
            {"post_processor": TEMPLATE | {"special_tokens": {"x": {"id": "x", "ids": [999], "tokens": ["x"]}}}},
            "it encodes a text with the unknown token 999",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
            "is not a tokenizer: index out of bounds",
        ),
        ({"model__continuing_subword_prefix": "##"}, "its continuing_subword_prefix is '##'"),
        ({"model__vocab": {"a": 10**9}}, "the id of a token is 1000000000"),
        ({"model": UNIGRAM}, "no byte-level BPE"),
        ({"decoder": {"type": "WordPiece", "prefix": "ByteLevel", "cleanup": True}}, "no byte-level BPE"),
        ({"decoder": None}, "no byte-level BPE"),
    ],
)
def test_files_that_the_library_takes(changes, words, tokenizer, tmp_path, capfd):
    """And that would make it abort, panic or encode to tokens that are not there."""
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.load(saved(tokenizer, tmp_path / "t.json", **changes))
    assert str(tmp_path / "t.json") in str(error.value)
    assert capfd.readouterr().err == ""


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


def sample_of(texts: Iterable[str]) -> list[str]:
    sample = Sample(Cutter(Tokenizer.train([TEXT], 300).backend))
    sizes = list(sample.add(texts))
    assert len(sizes) == 2000
    return list(sample.pieces())


def test_of_very_many_words_a_sample_is_used(monkeypatch):
    texts = [f"{i * 7919 % 10_007} word{i} " * 20 for i in range(2000)]
    monkeypatch.setattr(tokenizer_sample, "BLOCK", 1)
    assert sample_of(iter(texts)) == texts
    for name, bound in (("TRAINING_WORDS", 2000), ("TRAINING_CHARACTERS", sum(map(len, texts)) // 15)):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_sample, name, bound)
            taken = sample_of(iter(texts))
        places = [texts.index(piece) for piece in taken]
        assert 80 < len(places) < 200
        assert max(b - a for a, b in itertools.pairwise([0, *places, 2000])) < 3 * 2000 / len(places)  # evenly spaced
        distinct = sum(map(len, {word for piece in taken for word in piece.split()}))
        assert bound * 0.6 < (distinct if name == "TRAINING_WORDS" else sum(map(len, taken))) <= bound


def test_texts_are_read_once_and_not_held(tokenizer):
    class Text(str):
        pass

    held: list[weakref.ref] = []

    def texts() -> Iterator[str]:
        for start in range(0, len(TEXT), 40):
            text = Text(TEXT[start : start + 40])
            held.append(weakref.ref(text))
            assert sum(ref() is not None for ref in held) <= 2
            yield text

    pieces = [TEXT[start : start + 40] for start in range(0, len(TEXT), 40)]
    assert Tokenizer.train(texts(), 400).fingerprint == Tokenizer.train(pieces, 400).fingerprint
    assert len(held) == len(pieces)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_digits_of_a_token(digits, tokenizer, tmp_path):
    numbers = " ".join(str(number) for number in range(1000, 4000)) * 3
    trained = Tokenizer.train([numbers], 1500, digits=digits)
    lengths = {len(trained.token_bytes(t)) for t in range(trained.vocab_size) if trained.token_bytes(t).isdigit()}
    assert max(lengths) == digits
    trained.save(tmp_path / "tokenizer.json")
    loaded, text = Tokenizer.load(tmp_path / "tokenizer.json"), f"{numbers} 12345678 \u0661\u0662\u0663\u0664 x1y22 "
    assert loaded.encode(text * 9) == loaded.backend.encode(text * 9).ids == trained.encode(text * 9)
    assert len(list(loaded._cutter.cut(text * 9, 100))) > 100  # long texts are cut into pieces
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("digits", [0, 4])
def test_other_numbers_of_digits(digits):
    with pytest.raises(UserError, match=f"at most 1, 2 or 3 digits, not {digits}"):
        Tokenizer.train([TEXT], 300, digits=digits)


def test_tokens_for_chats(tokenizer, tmp_path):
    trained = Tokenizer.train([TEXT], 400, chat=True)
    assert trained.vocab_size == tokenizer.vocab_size + 15
    assert [trained.backend.token_to_id(token) for token in (EOS_TOKEN, *CHAT_TOKENS)] == list(range(16))
    assert trained.eos_id == 0
    with pytest.raises(UserError, match=r"at least 272 tokens .* and 15 for chats"):
        Tokenizer.train([TEXT], 271, chat=True)
    text = f"<|im_start|>user\n{TEXT}<|im_end|>{EOS_TOKEN}<|reserved_3|>"
    assert min(trained.encode(text)) > 15  # in a text they are text
    assert trained.decode(trained.encode(text)) == text
    assert [ids.tolist() for ids in trained.encode_batch([text])] == [trained.encode(text)]
    trained.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text, split_special_tokens=True) == trained.encode(text)
    tagged = theirs.encode("<|im_start|>user\na<|im_end|>")
    assert (tagged[0], tagged[-1]) == (1, 2)
    assert tagged[1:-1] == trained.encode("user\na")
    assert set(CHAT_TOKENS) <= set(theirs.all_special_tokens) | set(theirs.get_added_vocab())
    assert trained.decode([1, 2]) == "<|im_start|><|im_end|>"


@pytest.mark.parametrize("phase", ["words", "merges"])
def test_ctrl_c_ends_training_inside_the_library(phase):
    """The library is busy for minutes with this text, and does not look for signals."""
    code = f"""
import random, signal, sys
from fastllm.data import progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a command in the background, shells have it ignored
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
