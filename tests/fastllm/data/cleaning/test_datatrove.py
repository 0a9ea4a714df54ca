"""datatrove's filters as an oracle: with the same words and thresholds, the same decisions, but for what is listed."""

from __future__ import annotations

import random

import pytest

from fastllm.data.cleaning import C4, FineWeb, Gopher, Repetition
from fastllm.data.cleaning.words import count_sentences, split_words
from tests.fastllm.data.cleaning.samples import TEXTS, document

c4_filters = pytest.importorskip("datatrove.pipeline.filters.c4_filters")
fineweb_filter = pytest.importorskip("datatrove.pipeline.filters.fineweb_quality_filter")
gopher_filter = pytest.importorskip("datatrove.pipeline.filters.gopher_quality_filter")
repetition_filter = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
Document = pytest.importorskip("datatrove.data").Document

ODD = [
    "- a point of the list", "•another point", "# # # ## #", "and so on...", "Read more…", "12 34 56 78 90", "Home",
    "{ x = 1; }", "This has [1] a mark or two[citation needed] in it.", "lorem ipsum dolor sit amet.", "short.",
    "Enable javascript to see it.", "a b c d e f g h.", "We use cookies to know you better.", "the of and to with",
    "x" * 1200 + " is long, you see.",
]  # fmt: skip


def texts():
    rng = random.Random(3)
    sentences = [line for name in ("en", "de", "ru") for line in TEXTS[name].splitlines()]
    words = [word.strip(".,!").lower() for word in TEXTS["en"].split()]
    for _ in range(600):
        pool = rng.sample(sentences, rng.randint(1, 8)) + rng.sample(ODD, rng.randint(0, 6))
        pool += [
            " ".join(rng.choices(words, k=rng.randint(1, 30))) + rng.choice(["", " end.", " end!"]) for _ in range(5)
        ]
        yield rng.choice(["\n", "\n\n"]).join(rng.choices(pool, k=rng.randint(2, 30)))


@pytest.fixture(autouse=True)
def same_words(monkeypatch):
    for module in (gopher_filter, repetition_filter, fineweb_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: split_words(text))
    monkeypatch.setattr(
        c4_filters, "split_into_sentences", lambda text, language: [None] * count_sentences([text.strip()])
    )


def both(ours, theirs, text):
    doc, other = document(text, language="en"), Document(text=text, id="1")
    kept, verdict = ours(doc) == "", theirs.filter(other)
    return (kept, doc.text), (verdict is True, other.text)


def compare(ours, theirs, among, at_least):
    """The same decisions, with at least so many of each kind."""
    judge = ours.build()
    decisions = []
    for text in among:
        (kept, cleaned), (other_kept, other_cleaned) = both(judge, theirs, text)
        assert kept == other_kept, text
        decisions.append(kept)
        if kept:
            assert cleaned.replace("\n\n", "\n") == other_cleaned.replace("\n\n", "\n")
    assert min(decisions.count(True), decisions.count(False)) >= at_least


def test_gopher():
    """Blank lines are lines for datatrove: none here."""
    compare(Gopher(), gopher_filter.GopherQualityFilter(), [text.replace("\n\n", "\n") for text in texts()], 50)


def test_repetition():
    """In a short text datatrove counts an n-gram that occurs once as the most frequent one: none here."""
    among = [text for text in texts() if len(text.split()) >= 50]
    compare(Repetition(), repetition_filter.GopherRepetitionFilter(), among, 50)


@pytest.mark.parametrize("marks", [True, False])
def test_c4(marks):
    theirs = c4_filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5, filter_no_terminal_punct=marks)
    compare(C4(terminal_marks=marks), theirs, texts(), 50)


def test_fineweb():
    """Blank lines count as line feeds for datatrove: none here."""
    theirs = fineweb_filter.FineWebQualityFilter(char_duplicates_ratio=0.1, short_line_length=29)
    compare(FineWeb(), theirs, [text.replace("\n\n", "\n") for text in texts()], 50)
    theirs = fineweb_filter.FineWebQualityFilter(char_duplicates_ratio=1.0, short_line_length=29)
    compare(FineWeb(max_duplicate_characters=1), theirs, [text.replace("\n\n", "\n") for text in texts()], 10)
