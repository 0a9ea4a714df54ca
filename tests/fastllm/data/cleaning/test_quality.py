"""The rules of Gopher, C4 and FineWeb, each at its threshold."""

from __future__ import annotations

import pytest

from fastllm.data.cleaning import C4, FineWeb, Gopher
from fastllm.data.cleaning.words import count_sentences, split_lines, split_paragraphs, split_words, width
from tests.fastllm.data.cleaning.samples import TEXTS, document

# With the, and, with of the stop words.
WORDS = ("the", "ship", "and", "a", "crew", "left", "port", "at", "dawn", "with", "fish", "for", "trade")


def prose(number: int) -> str:
    return " ".join(f"{WORDS[i % len(WORDS)]}" for i in range(number))


def judged(settings, text, **metadata):
    doc = document(text, **metadata or {"language": "en"})
    return settings.build()(doc), doc


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (prose(50), prose(49), "gopher: fewer than 50 words"),
        (prose(49) + " ship - … |", prose(49) + " - … |", "gopher: fewer than 50 words"),  # marks are no words
        (prose(100_000), prose(100_001), "gopher: more than 100000 words"),
        ("the and for " * 20, "the and is " * 20, "gopher: mean word length below 3"),
        ("the and " + "abcdefghij " * 60, "the and " + "abcdefghijk " * 200, "gopher: mean word length above 10"),
        (prose(90) + " #a" * 10, prose(89) + " #a" * 11, "gopher: more than 0.1 # a word"),
        (
            prose(90) + " so..." * 9 + " end",
            prose(80) + " so..." * 10 + " end",
            "gopher: more than 0.1 ellipses a word",
        ),
        (prose(90) + " so…" * 9 + " end", prose(80) + " so…" * 10 + " end", "gopher: more than 0.1 ellipses a word"),
        (
            "\n".join(["- " + prose(10)] * 9 + [prose(10)]),
            "\n\n".join(["• " + prose(10)] * 10),  # blank lines are no lines
            "gopher: more than 0.9 of lines begin with a bullet",
        ),
        (
            "\n".join([prose(12) + "... "] * 3 + [prose(12)] * 7),
            "\n".join([prose(12) + "…"] * 4 + [prose(12)] * 6),
            "gopher: more than 0.3 of lines end with an ellipsis",
        ),
        (prose(80) + " 1234" * 20, prose(79) + " 1234" * 21, "gopher: fewer than 0.8 of words have a letter"),
        ("the “And” " + "ship " * 60, "the " + "ship " * 60, "gopher: fewer than 2 stop words"),
    ],
)
def test_gopher(good, bad, reason):
    assert judged(Gopher(), good)[0] == ""
    assert judged(Gopher(), bad)[0] == reason


def test_gopher_counts_alike_in_ascii_and_beyond():
    """ASCII has a path of its own."""
    text = "A (small) test: it's 42, x_1 -- *** 3.14 [a] 'quoted' 100% e-mail __ ok? No! " + prose(50)
    plain, other = judged(Gopher(), text)[1], judged(Gopher(), text + " é")[1]
    figures, others = plain.metadata["gopher"], other.metadata["gopher"]
    number = len(text.split())
    assert figures["words"] == number - 3 == others["words"] - 1  # --, *** and __ are none
    assert figures["alphabetic_words"] == round((number - 6) / number, 3)  # nor have 42, 3.14 and 100% letters
    assert others["alphabetic_words"] == round((number - 5) / (number + 1), 3)
    assert figures["word_length"] == round((sum(map(len, text.split())) - 7) / (number - 3), 3)


def test_gopher_does_not_split_the_rest_of_a_far_too_long_text():
    for text in (prose(1000), "港口" * 1000):
        reason, doc = judged(Gopher(max_words=100), text)
        assert reason == "gopher: more than 100 words" and doc.metadata["gopher"] == {"words": 201}


def test_gopher_keeps_its_figures():
    doc = judged(Gopher(), TEXTS["en"])[1]
    assert doc.metadata["gopher"] == {
        "words": 79, "hashes": 0.0, "ellipses": 0.0, "bullet_lines": 0.0, "ellipsis_lines": 0.0,
        "alphabetic_words": 1.0, "word_length": 4.152, "stop_words": 7,
    }  # fmt: skip


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_words_without_spaces(language):
    """About as many words as the same story has in English, and no length of them."""
    doc = judged(Gopher(), TEXTS[language], language=language)[1]
    assert 70 <= doc.metadata["gopher"]["words"] <= 100 and "word_length" not in doc.metadata["gopher"]


def test_words_lines_and_sentences():
    assert split_words("a  b\tc\n d") == ["a", "b", "c", "d"]
    assert split_words("用Python写，很快。") == ["用", "Python", "写，", "很快。"]
    assert split_words("a b c d", 3) == ["a", "b", "c"] and split_words("中文很好用", 2) == ["中文", "很好"]
    assert split_lines("a\n\n \n b\r\n") == ["a", " b"]
    assert split_paragraphs("\na\nb\n\n\n\nc\n \n\n") == ["a\nb", "c"]
    assert count_sentences(["One. Two! Three? e.g. four", 'He said "No." Then left.', "第一。第二！（三）"]) == 8
    assert (width("word"), width("中文"), width("한국"), width("мир")) == (4, 6, 4, 3)


LINES = ("This is the first good line.", "Here is the second good line!", "Is this the third good line?")
GOOD = "\n".join(LINES)


@pytest.mark.parametrize(
    "line",
    [
        "A line without a terminal mark at its end",
        "A line that trails off into an ellipsis...",
        "Only four words here.",
        "Please enable Javascript to read this page properly.",
        "By reading this you accept our Cookie Policy today.",
        "This site uses cookies to make your visit better.",
        "See the " + "x" * 1001 + " for what is too long.",
    ],
)
def test_c4_removes_lines(line):
    reason, doc = judged(C4(terminal_marks=True), f"{LINES[0]}\n{line}\n{LINES[1]}\n{LINES[2]}")
    assert reason == "" and doc.text == GOOD
    assert doc.metadata["c4"] == {"lines": 4, "kept_lines": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD + "\nLorem ipsum dolor sit amet, consectetur.", "c4: lorem ipsum"),
        (GOOD + "\nThe code is if (x) { return; } and so on.", "c4: curly bracket"),
        ("\n".join(LINES[:2]), "c4: fewer than 3 sentences"),
        ("No line of this page\nhas a mark at its end", "c4: fewer than 3 sentences"),
        ("", "c4: fewer than 3 sentences"),
    ],
)
def test_c4_drops_documents(text, reason):
    assert judged(C4(), text)[0] == reason


def test_c4_keeps():
    for text in (
        "A line may have three sentences. This is the second one. And the third!",
        GOOD + '\nHe said that it was "quite good"\n“It was very good indeed.”',
        GOOD + "\n\nA paragraph stays one for the reader.",
    ):
        reason, doc = judged(C4(), text)
        assert reason == "" and doc.text == text
    # In a line that goes anyway a curly bracket is none: so does the code of C4.
    assert judged(C4(), GOOD + "\nif (x) {")[0] == ""


def test_c4_cuts_citations_and_joins_lines():
    doc = judged(C4(), f"  {LINES[0][:-1]}[12].[citation needed]\nMenu\n\n\n\n{LINES[1]}\n\nHome\n{LINES[2]}\n")[1]
    assert doc.text == f"{LINES[0]}\n\n{LINES[1]}\n\n{LINES[2]}"


def test_c4_switches():
    bad = f"{GOOD}\nno mark at the end of this {{ line\nlorem ipsum and javascript and cookie policy here.\nSo [1]."
    settings = C4(
        terminal_marks=False, min_line_words=1, citations=False, curly_brackets=False, lorem_ipsum=False,
        javascript=False, policies=(),
    )  # fmt: skip
    reason, doc = judged(settings, bad)
    assert reason == "" and doc.text == bad
    assert judged(C4(min_sentences=0), "Menu\nHome")[0] == "c4: fewer than 1 sentences"


def test_c4_requires_marks_of_english_only():
    text = TEXTS["de"].replace(".\n", "\n")
    assert judged(C4(terminal_marks=True), text, language="de")[1].text == text
    assert judged(C4(), text, language="en")[1].text == text  # as in FineWeb
    assert judged(C4(terminal_marks=True), text, language="en")[0] == "c4: fewer than 3 sentences"
    long = "很" * 1500 + "。\n" + TEXTS["zh"]  # a run without spaces is no word of 1,500 characters
    assert judged(C4(), long, language="zh")[1].text == long


def lines_of(marked: int, unmarked: int, length: int = 40) -> str:
    """Lines that differ, have 5 words and the length."""
    ends = ["."] * marked + [":"] * unmarked
    return "\n".join(f"{i:03d} the ship left ".ljust(length - 1, "x") + end for i, end in enumerate(ends))


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (lines_of(13, 87), lines_of(12, 88), "fineweb: at most 0.12 of lines end in a terminal mark"),
        (
            lines_of(67, 0, 30) + "\n" + lines_of(33, 0, 50),
            lines_of(67, 0, 29) + "\n" + lines_of(33, 0, 50),
            "fineweb: at least 0.67 of lines are short",
        ),
        (
            lines_of(91, 0) + "\n" + lines_of(9, 0),
            lines_of(90, 0) + "\n" + lines_of(10, 0),
            "fineweb: at least 0.1 of characters are in repeated lines",
        ),
        (
            "\n\n".join(
                f"the ship left:{i:030d}." for i in range(100)
            ),  # 99 line feeds for 300 words, without blank ones
            None,
            "fineweb: more than 0.3 line feeds a word",
        ),
    ],
)
def test_fineweb(good, bad, reason):
    if bad is None:
        assert judged(FineWeb(), good)[0] == reason
        assert judged(FineWeb(max_line_feeds=0.33), good)[0] == ""
    else:
        assert judged(FineWeb(), good)[0] == ""
        assert judged(FineWeb(), bad)[0] == reason


def test_fineweb_rules_can_be_switched_off():
    text = "short\n" * 10
    off = FineWeb(min_marked_lines=0, max_short_lines=1, max_duplicate_characters=1, max_line_feeds=1)
    assert judged(off, text)[0] == ""


def test_fineweb_in_chinese():
    """Lines of 12 characters say as much as English ones of 36 letters."""
    lines = [line for line in TEXTS["zh"].replace("，", "，\n").splitlines() if 10 <= len(line) < 30]
    assert len(lines) >= 5
    reason, doc = judged(FineWeb(min_marked_lines=0, max_line_feeds=1), "\n".join(lines), language="zh")
    assert reason == "" and doc.metadata["fineweb"]["short_lines"] < 0.2
