"""The rules of C4."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..document import Document
from .filter import Filter, Judge
from .words import SENTENCE_ENDS, count_sentences, in_english, is_unspaced, split_words

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


@dataclass(frozen=True)
class C4(Filter):
    """The heuristics of C4: Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.2.

    Lines are removed, so the text changes: those with fewer than 5 words, and those with the word Javascript, a word of
    more than 1,000 characters or a phrase of cookie notices (the last two from the code that made C4, c4_utils.py of
    TensorFlow Datasets). Wikipedia's citation marks are cut. A document is dropped where a line that these rules leave
    has "lorem ipsum" or a curly bracket (the paper says the page; the code, which counts, says the line), or where
    fewer than 3 sentences remain. The list of bad words and the duplicates of three sentences are not part of this
    filter. Unlike C4, a blank line between paragraphs stays.

    C4 also keeps only lines that end in a terminal mark (of any script here) or an end quotation mark. That rule is
    off by default, as in FineWeb: it removes 30% of tokens, headings and lists among them; ``terminal_marks = true``.
    As in mC4 (Xue et al. 2021) it is for English: it applies where the language is English, or unknown and the script
    Latin. Sentences end where a mark, a blank and no lower-case letter follow; C4 used NLTK's punkt, which knows
    abbreviations.

    datatrove differs: 5 sentences and 3 words a line (the paper's first version on arXiv); words counted before
    citation marks are cut; a line may end in an apostrophe, and only in ``"`` of the quotation marks.
    """

    name: ClassVar[str] = "c4"
    kinds: tuple[str, ...] = ("web", "table")
    terminal_marks: bool = False  # lines must end in one
    min_line_words: int = 5
    min_sentences: int = 3
    max_word_length: int = 1000
    citations: bool = True  # cut marks such as [1] and [citation needed]
    curly_brackets: bool = True  # drop documents with one
    lorem_ipsum: bool = True  # drop documents with it
    javascript: bool = True  # remove lines with the word
    policies: tuple[str, ...] = (
        "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    )  # remove lines with one of them  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_word_length >= 1, "max_word_length", "at least 1")

    def build(self) -> Judge:
        unwanted = [phrase.lower() for phrase in self.policies]
        if self.javascript:
            unwanted.append("javascript")

        def judge(document: Document) -> str:
            text = document.text
            lower = text.lower()
            phrases = [phrase for phrase in unwanted if phrase in lower]  # seldom any: lines are searched for these
            lorem_ipsum = self.lorem_ipsum and "lorem ipsum" in lower
            curly_bracket = self.curly_brackets and "{" in text
            citations = self.citations and "[" in text
            marks = self.terminal_marks and in_english(document)
            unspaced = is_unspaced(text)

            lines = text.splitlines()
            figures: dict[str, Any] = {"lines": sum(not line.isspace() for line in lines if line)}
            document.metadata[self.name] = figures
            kept: list[str] = []
            paragraphs = []  # the kept lines, and an empty one where the text had a blank line between two of them
            blank = False
            for line in lines:
                line = line.strip()
                if not line:
                    blank = bool(kept)
                    continue
                if len(line) > self.max_word_length and self._has_long_word(line):
                    continue
                if citations:
                    line = _CITATION.sub("", line)
                if not line or (marks and (line[-1] not in SENTENCE_ENDS or line.endswith("..."))):
                    continue
                if unspaced:
                    words = len(split_words(line, self.min_line_words))
                else:
                    words = len(line.split(None, self.min_line_words))
                if words < self.min_line_words:
                    continue
                if lorem_ipsum and "lorem ipsum" in line.lower():
                    return "c4: lorem ipsum"
                if phrases and "javascript" in phrases and "javascript" in line.lower():
                    continue
                if curly_bracket and "{" in line:
                    return "c4: curly bracket"
                if phrases and any(phrase in line.lower() for phrase in phrases):
                    continue
                if blank:
                    paragraphs.append("")
                    blank = False
                kept.append(line.strip())
                paragraphs.append(kept[-1])
            figures["kept_lines"] = len(kept)
            if len(kept) < max(1, self.min_sentences):  # a line is at least one sentence
                figures["sentences"] = count_sentences(kept)
                if figures["sentences"] < max(1, self.min_sentences):
                    return f"c4: fewer than {max(1, self.min_sentences)} sentences"
            cleaned = "\n".join(paragraphs)
            if cleaned != text:
                document.text = cleaned
            return ""

        return judge

    def _has_long_word(self, line: str) -> bool:
        return any(len(word) > self.max_word_length for word in split_words(line))
