"""The rules that FineWeb adds to those of Gopher and C4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..document import Document
from .filter import Filter, Judge, rounded
from .words import SENTENCE_ENDS, count_duplicates, may_be_unspaced, split_lines, split_words, width


@dataclass(frozen=True)
class FineWeb(Filter):
    """The custom filters of FineWeb: Penedo et al., "The FineWeb Datasets" (2024), section 3.6.

    A document is dropped where at most 12% of lines end in a terminal mark, at least 10% of characters are in lines
    that repeat an earlier one, or at least 67% of lines are shorter than 30 characters. The fourth rule, more than 0.3
    line feeds a word (lists), is in the code that made FineWeb and not in the paper; blank lines do not count in it, as
    C4's code left none.

    Marks are of all scripts, and Thai and Lao, which have none, pass. In the length of a line a character of Han or
    kana counts as three, a syllable of Hangul as two. Words are those of ``words``. Lines are those that are not blank,
    as in datatrove.

    datatrove differs: 1% of characters in repeated lines (0.01 for the paper's 0.1); a bound that is met is kept (here
    the paper's ≤ and ≥ drop), and a line of 30 characters is short; quotation marks end no line.
    """

    name: ClassVar[str] = "fineweb"
    fractions: ClassVar[tuple[str, ...]] = ("min_marked_lines", "max_duplicate_characters", "max_short_lines")
    kinds: tuple[str, ...] = ("web", "table")
    min_marked_lines: float = 0.12  # drop at this share of lines with a terminal mark, or less; 0: never
    max_duplicate_characters: float = 0.1  # drop at this share of characters in repeated lines, or more; 1: never
    max_short_lines: float = 0.67  # drop at this share of short lines, or more; 1: never
    short_line: int = 30  # characters that a line needs
    max_line_feeds: float = 0.3  # for each word

    def build(self) -> Judge:
        def judge(document: Document) -> str:
            text = document.text
            lines = split_lines(text)
            if not lines:
                return "fineweb: no lines"
            wide = may_be_unspaced(text)
            marked = sum(line.rstrip()[-1] in SENTENCE_ENDS for line in lines)
            short = sum((width(line) if wide else len(line)) < self.short_line for line in lines)
            figures = {
                "marked_lines": marked / len(lines),
                "short_lines": short / len(lines),
                "duplicate_characters": count_duplicates(lines)[1] / (len(text) - text.count("\n")),
                "line_feeds": (len(lines) - 1) / len(split_words(text)),
            }
            document.metadata[self.name] = rounded(figures)
            if self.min_marked_lines and figures["marked_lines"] <= self.min_marked_lines:
                return f"fineweb: at most {self.min_marked_lines:g} of lines end in a terminal mark"
            if 1 > self.max_short_lines <= figures["short_lines"]:
                return f"fineweb: at least {self.max_short_lines:g} of lines are short"
            if 1 > self.max_duplicate_characters <= figures["duplicate_characters"]:
                return f"fineweb: at least {self.max_duplicate_characters:g} of characters are in repeated lines"
            if figures["line_feeds"] > self.max_line_feeds:
                return f"fineweb: more than {self.max_line_feeds:g} line feeds a word"
            return ""

        return judge
