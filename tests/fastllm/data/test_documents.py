from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastllm.data.documents import documents

WORDS = (
    "word ",
    "\n",
    "\n\n",
    "\r\n",
    "\f",
    "Chapter 3\n\n",
    "    indented",
    ". ",
    "。",
    "e\u0301",
    "👩\u200d👧",
    "x" * 50,
)


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=200).map("".join), st.integers(4, 200), st.integers(1, 500))
@example("\n" * 5000, 100, 500)
@example("\r\n" * 5000, 101, 500)
@example("a" * 5000, 100, 7)
def test_documents_are_the_text(text, size, part):
    """For any parts in which it comes."""
    cut = list(documents([text], size))
    assert "".join(cut) == text
    assert all(0 < len(document) <= size for document in cut)
    assert all(len(document) >= size // 4 - 1 for document in cut) or len(cut) == 1
    assert not any(a.endswith("\r") and b.startswith("\n") for a, b in itertools.pairwise(cut))
    assert list(documents((text[i : i + part] for i in range(0, len(text), part)), size)) == cut


LINE = "some words in a line, and more of them.\n"


@pytest.mark.parametrize(
    ("between", "begin"),
    [
        ("\f\n", "Next page"),
        ("\n\n\n", "CHAPTER IV.\n\nNext"),
        ("\n", "Chapter 12\nNext"),
        ("\n", "## Next"),
        ("\r\n\r\n", "## Next"),
        ("\n", "Next\n====\n"),
        ("\n", "\\section{Next}"),
        ("\n", "第十二章 "),
        ("\n\n\n", "Next"),
        ("\n\n", "def next():\n"),
    ],
)
def test_the_best_place_is_taken(between, begin):
    """Before the chapter, though paragraphs and lines would make longer documents."""
    chapter = f"{LINE * 3}\n" * 6 + LINE + "\n    indented\n" + LINE
    text = (begin + LINE + chapter + between) * 20
    size = len(begin + chapter + between + LINE) * 3 // 2
    cut = list(documents([text], size))
    assert len(cut) == 20
    assert all(document.startswith(begin) for document in cut)


@pytest.mark.parametrize(
    ("unit", "end"),
    [
        (LINE * 3 + "\n", "\n\n"),
        (LINE, ".\n"),
        ("one,two;\r\n", "\r\n"),
        ("One sentence. ", ". "),
        ("字字字字。", "。"),
        ("word ", " "),
        ("日本", ""),
        ("e\u0301", "\u0301"),
        ("👩\u200d👧", "👧"),
    ],
)
def test_without_chapters(unit, end):
    cut = list(documents([unit * 400], 150))
    assert len(cut) > 5
    assert all(document.endswith(end) for document in cut)
