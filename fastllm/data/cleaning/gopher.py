"""The quality rules of Gopher."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ..document import Document
from .filter import Filter, Judge, rounded
from .words import in_english, is_unspaced, may_be_unspaced, split_lines, split_spaced_words, split_words, width

_LETTER = re.compile(r"[^\W\d_]")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_ASCII = [chr(code) for code in range(128)]
_MARKS = "".join(char for char in _ASCII if not char.isalnum() and not char.isspace()).encode()
_NOT_LETTERS = _MARKS + b"0123456789"
_NOT_WORD = re.compile(r"\W+")
_BULLETS = ("•", "‣", "●", "◦", "▪", "-", "*")
_SYMBOLS = ".,;:!?\"'()[]{}“”‘’«»…—–-*_"
# Indic scripts have signs that are characters but no letters: words that are too long with them are counted without.
_SIGNS = re.compile("[\u0900-\u0dff]")


@dataclass(frozen=True)
class Gopher(Filter):
    """The quality filter of MassiveText: Rae et al., "Scaling Language Models" (2021), appendix A.1.1.

    A document is dropped where it breaks a rule: 50 to 100,000 words; a mean word length of 3 to 10 characters; at most
    0.1 "#" and 0.1 ellipses a word; at most 90% of lines begin with a bullet and at most 30% end with an ellipsis; 80%
    of words have a letter; 2 of 8 English stop words (in English, or where the language is unknown and the script
    Latin). The paper leaves open what words and lines are. Here words are as in ``words``, marks at their ends
    included; those without a letter or digit count in the shares alone, as in datatrove. A line is one that is not
    blank. In the length of a word a syllable of Hangul counts as two characters, and signs of Indic scripts do not make
    it too long; where most words are in scripts written without spaces there is no word length.

    datatrove differs: spaCy's tokens for words, so that marks are words in the shares, and far more text with code or
    figures misses the 80%; blank lines count as lines; a bullet is "•" or "-", and "•" alone
    is a word; stop words in lower case only.
    """

    name: ClassVar[str] = "gopher"
    fractions: ClassVar[tuple[str, ...]] = ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")
    kinds: tuple[str, ...] = ("web", "table")
    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_hashes: float = 0.1  # "#" for each word
    max_ellipses: float = 0.1  # "..." or "…" for each word
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_stop_words: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_words >= max(1, self.min_words), "max_words", "at least min_words, and 1")
        self._require(self.max_word_length >= self.min_word_length, "max_word_length", "at least min_word_length")
        distinct = len(set(self.stop_words))
        self._require(
            self.min_stop_words <= distinct, "min_stop_words", f"at most {distinct}, the number of stop_words"
        )

    def build(self) -> Judge:
        stop_words = frozenset(word.lower() for word in self.stop_words)
        too_long = f"gopher: more than {self.max_words} words"

        def judge(document: Document) -> str:
            text = document.text
            words = split_words(text, 2 * self.max_words + 1)
            if len(words) > 2 * self.max_words:  # far too many: the rest is not split, to save memory
                document.metadata[self.name] = {"words": len(words)}
                return too_long
            alphabetic, symbols = _count_kinds(text, words)
            number = len(words) - len(symbols)
            document.metadata[self.name] = {"words": number}
            if number > self.max_words:
                return too_long
            if number < self.min_words or not number:
                return f"gopher: fewer than {max(1, self.min_words)} words"

            lines = split_lines(text)
            starts = [line.lstrip()[:1] for line in lines]
            ellipses = text.count("...") + text.count("…")
            ended = sum(line.rstrip().endswith(("...", "…")) for line in lines) if ellipses else 0
            figures: dict[str, float] = {
                "words": number,
                "hashes": text.count("#") / len(words),
                "ellipses": ellipses / len(words),
                "bullet_lines": sum(map(starts.count, _BULLETS)) / len(lines),
                "ellipsis_lines": ended / len(lines),
                "alphabetic_words": alphabetic / len(words),
            }
            length = _mean_length(text, words, symbols, number, self.max_word_length)
            if length is not None:
                figures["word_length"] = length
            if self.min_stop_words and in_english(document):
                figures["stop_words"] = _count(stop_words, words, self.min_stop_words)
            document.metadata[self.name] = rounded(figures)
            return self._reason(figures)

        return judge

    def _reason(self, figures: dict[str, float]) -> str:
        length = figures.get("word_length", self.min_word_length)
        if length < self.min_word_length:
            return f"gopher: mean word length below {self.min_word_length:g}"
        if length > self.max_word_length:
            return f"gopher: mean word length above {self.max_word_length:g}"
        if figures["hashes"] > self.max_hashes:
            return f"gopher: more than {self.max_hashes:g} # a word"
        if figures["ellipses"] > self.max_ellipses:
            return f"gopher: more than {self.max_ellipses:g} ellipses a word"
        if figures["bullet_lines"] > self.max_bullet_lines:
            return f"gopher: more than {self.max_bullet_lines:g} of lines begin with a bullet"
        if figures["ellipsis_lines"] > self.max_ellipsis_lines:
            return f"gopher: more than {self.max_ellipsis_lines:g} of lines end with an ellipsis"
        if figures["alphabetic_words"] < self.min_alphabetic_words:
            return f"gopher: fewer than {self.min_alphabetic_words:g} of words have a letter"
        if figures.get("stop_words", self.min_stop_words) < self.min_stop_words:
            return f"gopher: fewer than {self.min_stop_words} stop words"
        return ""


def _count_kinds(text: str, words: list[str]) -> tuple[int, list[str]]:
    """The number of words with a letter, and the words without a letter or digit."""
    if text.isascii():
        return _count_ascii_kinds(text, words)
    marked = [word for word in words if not word.isalpha()]
    plain = [word for word in marked if word.isascii()]
    with_letters, symbols = _count_ascii_kinds(" ".join(plain), plain)
    others = [word for word in marked if not word.isascii()]
    letterless = [word for word in others if not word[:-1].isalpha() and not _LETTER.search(word)]
    symbols += [word for word in letterless if not _LETTER_OR_DIGIT.search(word)]
    return len(words) - len(plain) + with_letters - len(letterless), symbols


def _count_ascii_kinds(text: str, words: list[str]) -> tuple[int, list[str]]:
    """Deleting all but letters and white space leaves as many words as have letters, and needs no loop in Python."""
    encoded = text.encode("ascii")
    with_letters = len(encoded.translate(None, _NOT_LETTERS).decode("ascii").split())
    if len(encoded.translate(None, _MARKS).decode("ascii").split()) == len(words):
        return with_letters, []
    return with_letters, [word for word in words if not _LETTER_OR_DIGIT.search(word)]


def _mean_length(text: str, words: list[str], symbols: list[str], number: int, most: float) -> float | None:
    """Characters of a word, where words are what spaces separate; of Hangul as in ``width``."""
    if not may_be_unspaced(text):
        return (sum(map(len, words)) - sum(map(len, symbols))) / number
    if is_unspaced(text):
        spaced = split_spaced_words(text)
        return sum(map(width, spaced)) / len(spaced) if 2 * len(spaced) > len(words) else None
    length = (width("".join(words)) - sum(map(len, symbols))) / number
    if length > most and _SIGNS.search(text):
        return len(_NOT_WORD.sub("", text)) / number
    return length


def _count(stop_words: frozenset[str], words: list[str], enough: int) -> int:
    """How many stop words occur; where ``enough`` do as they are, the others are not looked for."""
    distinct = set(words)
    found = len(stop_words & distinct)
    if found >= enough:
        return found
    return len(stop_words & {word.strip(_SYMBOLS).lower() for word in distinct})
