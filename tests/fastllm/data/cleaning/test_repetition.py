from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.data.cleaning import Repetition
from fastllm.data.cleaning.words import split_words
from tests.fastllm.data.cleaning.samples import TEXTS, document


def judged(text, **thresholds):
    doc = document(text)
    return Repetition(**thresholds).build()(doc), doc.metadata["repetition"]


def distinct(number, start=0):
    return " ".join(f"w{i:04d}" for i in range(start, start + number))


LIMITS = dict.fromkeys(Repetition._figures(""), 1.0)


def slow_figures(text):
    """The n-gram figures as their definition reads, one n-gram after the other."""
    words = split_words(text)
    figures = {}
    for n in (2, 3, 4):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        gram, count = counts.most_common(1)[0] if counts else ((), 0)
        figures[f"top_{n}_gram"] = len(" ".join(gram)) * count / len(text) if count > 1 else 0
    for n in range(5, 11):
        seen, place, characters = set(), 0, 0
        while place + n <= len(words):
            gram = tuple(words[place : place + n])
            if gram in seen:
                characters += sum(map(len, gram))
                place += n
            else:
                seen.add(gram)
                place += 1
        figures[f"duplicate_{n}_grams"] = characters / len(text)
    return figures


@given(st.lists(st.sampled_from(["a", "bc", "def", "中文", "é", "x."]), min_size=1, max_size=60).map(" ".join))
def test_n_grams_by_their_definition(text):
    figures = Repetition._figures(text)
    assert {name: figures[name] for name in slow_figures(text)} == slow_figures(text)


def test_n_grams_of_a_long_text_by_their_definition():
    rng = random.Random(1)
    pieces = [distinct(rng.randint(1, 12), rng.randint(0, 300)) for _ in range(400)]
    text = " ".join(rng.choices(pieces, k=800))
    figures = Repetition._figures(text)
    wanted = slow_figures(text)
    assert {name: figures[name] for name in wanted} == wanted
    assert wanted["duplicate_10_grams"] > 0.01


def test_ordinary_text_repeats_nothing():
    for text in TEXTS.values():
        reason, figures = judged(text)
        assert reason == "" and not any("duplicate" in name for name in figures)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(["Home", distinct(50)] + ["Home"] * 2), "duplicate lines above 0.3"),
        ("\n\n".join(["Home", distinct(50)] + ["Home"] * 2), "duplicate lines above 0.3"),
        (
            "\n".join([distinct(20), distinct(30, 100), distinct(20, 200), distinct(20)]),
            "duplicate line characters above 0.2",
        ),
        (distinct(40) + " red fox" * 20, "top 2 gram above 0.2"),
        (distinct(60) + "".join(f" {distinct(10, 9 * i)}" for i in range(8)), "duplicate 5 grams above 0.15"),
    ],
)
def test_reasons(text, reason):
    assert judged(text)[0] == f"repetition: {reason}"


@pytest.mark.parametrize("name", LIMITS)
def test_each_threshold_drops_above_it_and_keeps_at_it(name):
    text = "\n\n".join([distinct(12), distinct(12), distinct(3) + " " + distinct(3), "tail words here"])
    figure = Repetition._figures(text)[name]
    assert 0 < figure < 1
    assert judged(text, **LIMITS | {name: figure})[0] == ""
    assert (
        judged(text, **LIMITS | {name: figure * 0.999})[0]
        == f"repetition: {name.replace('_', ' ')} above {figure * 0.999:g}"
    )


def test_paragraphs():
    text = "\n\n".join(["a\nb", "c\nd"] + ["e\nf"] * 3)
    _, figures = judged(text, **LIMITS)
    assert figures["duplicate_paragraphs"] == 0.4 and figures["duplicate_paragraph_characters"] == round(
        6 / len(text), 3
    )


@pytest.mark.parametrize("text", ["", " ", "a", "a b", "a a", "\n\n\n", "a b c d e f g h i"])
def test_small_texts(text):
    assert judged(text, **LIMITS)[0] == ""
