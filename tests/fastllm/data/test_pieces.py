"""Texts are cut where no token changes: the ids of the pieces, one after the other, are those of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastllm.data import pieces
from fastllm.data.pieces import GPT2_SPLIT, LLAMA3_SPLIT, O200K_SPLIT, QWEN_SPLIT, SPLIT, Cutter
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer

TEXT = (
    "def add(a, b):\n    return a + b\r\n\r\n\n  x's I'LL 1234567 ___ !!\n\t naïve 日本語。\u2028 \u00a0 e\u0301\n"
    "👩\u200d👩\u200d👧 \n"
) * 30

# What words, line ends and spaces are made of, and what can join or part them.
CHARACTERS = (
    *("a", "Z", "s", "S", "t", "l", "L", "r", "e", "v", "m", "d", "'", "\u2019", "ſ", "ß", "0", "9", "½", "٣", "Ⅷ"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\n\n", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u2028", "\u2029", "\u3000"),
    *("\u200b", "\u200d", "\u180e", "\ufeff", "\x00", ".", "!", "-", "/", "_", "<|endoftext|>", "e\u0301", "\u0301"),
    *(
        "é",
        "日",
        "本",
        "。",
        "ก็",
        "한",
        "\u1112\u1161",
        "\u0958",
        "😀",
        "👩\u200d👧",
        "𝒳",
        "\U0001e900",
        "ǅ",
        "ʰ",
        "'s",
        "'LL",
        "123",
    ),
)
mixed = st.lists(st.sampled_from(CHARACTERS), max_size=60).map("".join)
runs = st.lists(st.tuples(st.sampled_from(CHARACTERS), st.integers(1, 400)), max_size=6).map(
    lambda parts: "".join(what * n for what, n in parts)
)
alphabets = st.sampled_from([" \n", " \n\t", "\r\n ", "a'", "1a", "-\n", " -", "aé1", "\u2028\n"])
jumbled = st.tuples(alphabets, st.binary(max_size=3000)).map(
    lambda drawn: "".join(drawn[0][byte % len(drawn[0])] for byte in drawn[1])
)
texts = st.one_of(mixed, runs, jumbled, st.tuples(mixed, runs, mixed).map("".join), st.text())


def trained_with(split: str | None, normalizer: object = None, text: str = TEXT, vocab_size: int = 420) -> Tokenizer:
    """A tokenizer as others have it; None: GPT-2's split."""
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [byte_level] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), byte_level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else byte_level
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return Tokenizer(backend)


def joined(tokenizer: Tokenizer, cut: Iterable[str]) -> list[int]:
    return [i for encoding in tokenizer.backend.encode_batch_fast(list(cut)) for i in encoding.ids]


OURS = Tokenizer.train([TEXT], 420)
KNOWN = {
    "ours": OURS,
    "llama3": trained_with(LLAMA3_SPLIT),
    "qwen": trained_with(QWEN_SPLIT),
    "qwen-nfc": trained_with(QWEN_SPLIT, normalizers.NFC()),
    "gpt2": trained_with(None),
    "gpt2-split": trained_with(GPT2_SPLIT),
    "o200k": trained_with(O200K_SPLIT),
}


@pytest.mark.parametrize("name", KNOWN)
@settings(deadline=None, max_examples=40)
@given(texts, st.integers(2, 40), st.sampled_from([1, 3, 64]))
@example("a" * 5000, 20, 64)
@example(" " * 5000 + "\n" + " " * 300, 20, 3)
@example("\u0958\n" * 40, 7, 64)
@example("\u2029\u2029" + "-" * 5000, 3, 1)
@example("\u2029\u2029\x1c\x1c" * 5000, 3, 1)
@example("don't we'll 'saaa" * 30, 3, 64)
def test_pieces_have_the_ids_of_the_whole(name, text, size, look):
    tokenizer = KNOWN[name]
    cutter = Cutter(tokenizer.backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LOOK", look)
        cut = list(cutter.cut(text, size))
    assert "".join(cut) == text
    assert all(cut) or cut == [""]
    assert joined(tokenizer, cut) == tokenizer.backend.encode(text).ids


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["a", "日", "1", "-", " ", "\n", "\r\n", " \n", "ACGT", "A1+/", "\u0301", "😀", "'s", ".\n"]),
    st.integers(0, 99),
)
def test_long_runs_are_cut_too(unit, lead):
    """Whatever it is made of, a text ends up in pieces of about the size that was asked for."""
    text = "x " * lead + unit * (12_000 // len(unit))
    cut = list(Cutter(OURS.backend).cut(text, 3000))
    assert max(map(len, cut)) <= 3000
    assert len(cut) <= 3 * len(text) // 3000 + 1
    assert joined(OURS, cut) == OURS.backend.encode(text).ids


def test_words_are_bounded():
    for unit in ("a", "1", "-", " ", "\n", "\r\n", " \n", "日", "\u0301"):
        words = OURS.backend.pre_tokenizer.pre_tokenize_str(unit * 2000)
        assert max(stop - start for _, (start, stop) in words) <= 257


def test_prose_and_code_are_split_as_before():
    before = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    now = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    text = TEXT + "=" * 120 + "\n" + " " * 120 + "\n" * 120 + "x" * 128
    assert now.pre_tokenize_str(text) == before.pre_tokenize_str(text)


def changed(change: object) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(KNOWN["llama3"].backend.to_str())
    change(backend)  # type: ignore[operator]
    return Tokenizer(backend)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.add_tokens(["a b"]),
        lambda b: b.add_tokens([AddedToken("<x>", lstrip=True)]),
        lambda b: b.add_tokens([AddedToken("<x>", rstrip=True)]),
        lambda b: b.add_tokens([AddedToken("<x>", single_word=True)]),
        lambda b: setattr(b, "normalizer", normalizers.Strip()),
        lambda b: setattr(b, "normalizer", normalizers.Replace(" ", "")),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\d\s+\d|."), "isolated")),
        lambda b: setattr(
            b, "post_processor", processors.TemplateProcessing(f"{EOS_TOKEN} $A", None, [(EOS_TOKEN, 0)])
        ),
    ],
)
def test_what_is_not_known_is_not_cut(change):
    tokenizer = changed(change)
    text = "word <x> a b 1  2 " * 20
    assert list(Cutter(tokenizer.backend).cut(text, 10)) == [text]
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids


@given(texts)
@settings(deadline=None, max_examples=60)
def test_added_tokens_are_not_parted(text):
    tokenizer = changed(lambda b: b.add_tokens(["<tool>", "a1", ".日"]))
    text = "<tool>a1.日".join((text, text, ""))
    assert joined(tokenizer, Cutter(tokenizer.backend).cut(text, 5)) == tokenizer.backend.encode(text).ids


def test_transformers_gives_the_same_ids(tmp_path):
    OURS.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = TEXT * 12 + "a" * 40_000 + " " * 20_000 + "\r\n" * 9000 + "-" * 20_000 + "日本" * 9000
    assert OURS.encode(text) == theirs(text)["input_ids"]
    assert [list(ids) for ids in OURS.encode_batch([text, "", "x"])] == [
        theirs(t)["input_ids"] for t in (text, "", "x")
    ]


def test_a_tokenizer_of_an_earlier_run(tmp_path):
    """Its split has no bounds; it loads, and encodes as it did."""
    before = KNOWN["llama3"]
    before.save(tmp_path / "tokenizer.json")
    assert (
        "p{L}+"
        in json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]["pattern"][
            "Regex"
        ]
    )
    text = TEXT * 12 + "a" * 40_000 + TEXT
    assert all(len(list(Cutter(known.backend).cut(TEXT * 50, 1000))) > 100 for known in KNOWN.values())
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == before.backend.encode(text).ids
    assert len(list(Cutter(before.backend).cut(TEXT * 50))) > 3
