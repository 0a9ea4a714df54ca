from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.data.cleaning import Normalisation
from fastllm.data.cleaning.normalisation import normalise
from tests.fastllm.data.cleaning.samples import TEXTS, document

ODD = (
    "\r\n\x0b\x0c\x85\u2028\u2029\x00\x7f\x93\xad\u200b\u200c\u200d\u2060\ufeff\ufffe"
    "\ud83d\ude00\u0301\u0323\u0344aé\u212a\u037e ن\u093c"
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a\r\nb\rc\n\rd", "a\nb\nc\n\nd"),
        ("a\x0bb\x0cc\x85d\u2028e\u2029f", "a\nb\nc\nd\ne\nf"),
        ("a\x00b\x1bc\x7fd\x93e\tf", "abcde\tf"),
        ("co\xadoperate zero\u200bwidth word\u2060joiner", "cooperate zerowidth wordjoiner"),
        ("\ufeffstart", "start"),
        ("e\u0301", "é"),
        ("e\xad\u0301", "é"),  # what is removed may have kept a mark from its letter
        ("می\u200cخواهم", "می\u200cخواهم"),  # the joiners that a script or an emoji needs stay
        ("क्\u200dष", "क्\u200dष"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("a\u200c\u200db \u200c \u200c\n\u200d", "ab  \n"),  # the fillers of e-mails in HTML do not
        ("\ud83d\ude00 \ud83d", "😀 \ufffd"),
        ("Ã© cafÃ©", "Ã© cafÃ©"),  # in the wrong character set: not guessed
        ("\u200fעברית\u200e", "\u200fעברית\u200e"),
        ("a" + "\u0301" * 100, "á" + "\u0301" * 29),
    ],
)
def test_what_becomes_of_characters(text, normal):
    assert normalise(text) == normal


@given(st.text(st.sampled_from(ODD), max_size=80) | st.text())
def test_twice_is_once(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode()  # no half of a surrogate pair


@given(st.sampled_from(ODD), st.integers(25, 70), st.sampled_from(ODD), st.integers(25, 70))
def test_twice_is_once_in_long_runs(first, n, second, m):
    once = normalise("x" + first * n + second * m)
    assert normalise(once) == once


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_normal_text_stays(text):
    text = unicodedata.normalize("NFC", text)
    doc = document(text)
    assert Normalisation().build()(doc) == ""
    assert doc.text == text and doc.metadata == {}


@pytest.mark.parametrize("text", ["", " \t\n", "\u200b\ufeff", "\u3000\xa0"])
def test_no_text_is_dropped(text):
    assert Normalisation().build()(document(text)) == "normalisation: no text"


def test_the_figure():
    doc = document("a\r\nb\x00\u200b")
    Normalisation().build()(doc)
    assert doc.text == "a\nb" and doc.metadata == {"normalisation": {"removed": 3}}
