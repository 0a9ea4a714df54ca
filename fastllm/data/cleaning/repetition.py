"""Repetition inside one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..document import Document
from .filter import Filter, Judge, rounded
from .words import count_duplicates, split_lines, split_paragraphs, split_words

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)  # words in an n-gram
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 / golden ratio


@dataclass(frozen=True)
class Repetition(Filter):
    """The repetition rules of MassiveText: Rae et al., "Scaling Language Models" (2021), table A1.

    A document is dropped where a figure exceeds its threshold. The shares of lines and paragraphs that repeat an
    earlier one, and of the characters in them; the share of characters in the most frequent 2-, 3- and 4-gram of words;
    the share in 5- to 10-grams that repeat an earlier one, no character counted twice. How the paper counts is taken
    from datatrove: the first occurrence is no repetition, and the search for n-grams steps over one that it has
    counted, from left to right. All shares are of the characters of the text.

    datatrove differs: spaCy's tokens for words; an n-gram that occurs once can be the most frequent one of a short
    text (here it counts 0); empty first and last lines count as lines.
    """

    name: ClassVar[str] = "repetition"
    kinds: tuple[str, ...] = ("web", "table")
    duplicate_lines: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraphs: float = 0.30
    duplicate_paragraph_characters: float = 0.20
    top_2_gram: float = 0.20
    top_3_gram: float = 0.18
    top_4_gram: float = 0.16
    duplicate_5_grams: float = 0.15
    duplicate_6_grams: float = 0.14
    duplicate_7_grams: float = 0.13
    duplicate_8_grams: float = 0.12
    duplicate_9_grams: float = 0.11
    duplicate_10_grams: float = 0.10

    def build(self) -> Judge:
        limits = {name: getattr(self, name) for name in self._figures("a")}

        def judge(document: Document) -> str:
            figures = self._figures(document.text)
            # Most of the figures of most documents are 0: left out, to keep the metadata small.
            document.metadata[self.name] = rounded({name: value for name, value in figures.items() if value})
            for name, limit in limits.items():
                if figures[name] > limit:
                    return f"repetition: {name.replace('_', ' ')} above {limit:g}"
            return ""

        return judge

    @staticmethod
    def _figures(text: str) -> dict[str, float]:
        size = max(1, len(text))
        figures: dict[str, float] = {}
        for name, parts in (("line", split_lines(text)), ("paragraph", split_paragraphs(text))):
            number, characters = count_duplicates(parts)
            figures[f"duplicate_{name}s"] = number / max(1, len(parts))
            figures[f"duplicate_{name}_characters"] = characters / size
        words = split_words(text)
        # Equal n-grams have equal hashes. Different ones collide at 2^-64 for a pair.
        hashes = word_hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        for n in _TOP:
            hashes = hashes[:-1] * _MULTIPLIER + word_hashes[n - 1 :]
            figures[f"top_{n}_gram"] = _characters_of_most_frequent(hashes, words, n) / size
        hashes = hashes[:-1] * _MULTIPLIER + word_hashes[_DUPLICATE[0] - 1 :]
        repeated = _characters_of_repeated(hashes, word_hashes, words)
        for n in _DUPLICATE:
            figures[f"duplicate_{n}_grams"] = repeated.get(n, 0) / size
        return figures


def _characters_of_most_frequent(hashes: NDArray[np.uint64], words: list[str], n: int) -> int:
    """Of the n-gram that occurs most often, the first of several: its length with single spaces × its occurrences."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    borders = np.ones(len(ordered) + 1, np.bool_)  # of runs of equal hashes
    np.not_equal(ordered[1:], ordered[:-1], out=borders[1:-1])
    if borders.all():
        return 0
    starts = borders.nonzero()[0]
    counts = starts[1:] - starts[:-1]
    most = int(counts.max())
    first = int(np.minimum.reduceat(order, starts[:-1])[counts == most].min())
    return (sum(map(len, words[first : first + n])) + n - 1) * most


def _characters_of_repeated(
    hashes: NDArray[np.uint64], word_hashes: NDArray[np.uint64], words: list[str]
) -> dict[int, int]:
    """For each n: the n-grams that repeat an earlier one, from left to right and none inside another, without spaces.

    Only n-grams that occur twice change anything, and they lie where shorter ones do so too: seldom anywhere.
    """
    order = np.argsort(hashes)
    ordered = hashes[order]
    equal = ordered[1:] == ordered[:-1]
    if not equal.any():
        return {}
    either = np.concatenate((equal, [False])) | np.concatenate(([False], equal))
    places = np.sort(order[either])
    grams = hashes[places]
    characters = {}
    for n in _DUPLICATE:
        if n > _DUPLICATE[0]:
            inside = places + n <= len(word_hashes)
            places, grams = places[inside], grams[inside]
            grams = grams * _MULTIPLIER + word_hashes[places + n - 1]
        total = free = 0
        seen: set[int] = set()
        for place, gram in zip(places.tolist(), grams.tolist(), strict=True):
            if place < free:
                continue
            if gram in seen:
                total += sum(map(len, words[place : place + n]))
                free = place + n
            else:
                seen.add(gram)
        if not total:
            break  # no n-gram is repeated, then no longer one is
        characters[n] = total
    return characters
