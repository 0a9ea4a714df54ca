"""Words, lines, sentence ends and scripts: what the rules of several filters count.

A word is what stands between white space. Scripts written without spaces have no such words; there a word is estimated
as 2 characters of Han or kana, or 4 of Thai, Lao, Tibetan, Burmese or Khmer (whose vowel and tone signs are characters
too), with the marks after them, cut from the start of each run. That is near the mean length of a word in those
languages. A phrase that is repeated inside a run may be cut differently each time, so the repetition rules find less
there, never more.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

from ..document import Document

_HAN = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SIGNS = "\u0e01-\u0e3a\u0e40-\u0eff\u0f00-\u109f\u1780-\u17ff\uaa60-\uaa7f"
_UNSPACED = re.compile(f"[{_HAN}{_SIGNS}]")
_UNSPACED_WORD = re.compile(rf"[{_HAN}]{{1,2}}[^\w\s]*|[{_SIGNS}]{{1,4}}[^\w\s]*|[^\s{_HAN}{_SIGNS}]+")
_UNSPACED_RUN = re.compile(f"[{_HAN}{_SIGNS}]+")
# Bytes of UTF-8 without the first ones of U+0800 to U+1FFF and from U+3000, where the unspaced scripts and Hangul are.
_NEAR = bytes((*range(0xE0), 0xE2))
_last: tuple[str, list[str]] = ("", [])
_HANGUL_RUN = re.compile("[\uac00-\ud7a3]+")
_HAN_RUN = re.compile(f"[{_HAN}]+")

# Unicode's property Sentence_Terminal for the scripts in use, and Tibetan's shad.
_MARKS = ".!?։؝؞؟۔܀܁܂߹।॥།༎༏༐༑၊။።፧፨᙮។៕᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮。꓿꘎꘏꛳꛷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡"
_QUOTES = '"”»」』'  # an "end quotation mark"; not the apostrophe
# Thai and Lao have no mark for the end of a sentence: their letters count as ends, so that the rules pass them.
SENTENCE_ENDS = frozenset(_MARKS + _QUOTES + "".join(map(chr, range(0x0E01, 0x0F00))))

_WIDE_MARKS = "".join(mark for mark in _MARKS if mark not in ".!?")
_CLOSING = "\"'”’»」』)\\]"
# The end of a sentence inside a line: after it there is a blank and no lower-case letter, or it needs no blank.
_INNER_END = re.compile(rf"[.!?][{_CLOSING}]*[ \t\u00a0]+(?![a-z\s])|[{_WIDE_MARKS}](?![\s{_CLOSING}{_WIDE_MARKS}]|\Z)")

_ENGLISH = re.compile(r"en(?:g|glish)?(?![a-z])", re.IGNORECASE)
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
CERTAIN = 0.5  # a language found with a lower probability is unknown


def is_unspaced(text: str) -> bool:
    """Whether the text has characters of a script that is written without spaces."""
    return may_be_unspaced(text) and _UNSPACED.search(text) is not None


def may_be_unspaced(text: str) -> bool:
    """Whether it has characters beyond Latin, Greek, Cyrillic, Semitic scripts and punctuation: a fast look."""
    return not text.isascii() and bool(text.encode("utf-8", "surrogatepass").translate(None, _NEAR))


def split_words(text: str, limit: int | None = None) -> list[str]:
    """The words of a text, in a list that is not to be changed; of a longer text the first ``limit``, to save memory.

    Several filters need the words of the same text: those of the last one are kept.
    """
    global _last
    if _last[0] is text:
        return _last[1]
    if is_unspaced(text):
        if limit is None or len(text) <= limit:
            words = _UNSPACED_WORD.findall(text)
        else:
            words = [found.group() for found in islice(_UNSPACED_WORD.finditer(text), limit)]
    else:
        words = text.split() if limit is None else text.split(None, limit)[:limit]
    if limit is None or len(words) < limit:
        _last = text, words
    return words


def split_spaced_words(text: str) -> list[str]:
    """The words that are not of scripts written without spaces."""
    return _UNSPACED_RUN.sub(" ", text).split()


def width(text: str) -> int:
    """Characters, where one says as much as several letters for several: Han and kana 3, syllables of Hangul 2.

    So a Chinese word of 2 characters is as wide as an English one of 5 letters and a space.
    """
    if not may_be_unspaced(text):
        return len(text)
    return len(text) + 2 * sum(map(len, _HAN_RUN.findall(text))) + sum(map(len, _HANGUL_RUN.findall(text)))


def split_lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.splitlines() if line and not line.isspace()]


def split_paragraphs(text: str) -> list[str]:
    """What stands between blank lines."""
    parts = [part.strip("\n") for part in text.strip().split("\n\n")]
    return [part for part in parts if part and not part.isspace()]


def count_sentences(lines: list[str]) -> int:
    """Each stripped line has one sentence, and one more for each end of a sentence inside it."""
    return len(lines) + len(_INNER_END.findall("\n".join(lines)))


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """Of lines or paragraphs: how many repeat an earlier one, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        else:
            seen.add(part)
    return number, characters


def sample_text(text: str, size: int) -> str:
    """At most ``size`` characters: the whole text, or four pieces from its beginning to its end."""
    if len(text) <= size:
        return text
    piece = max(1, size // 4)
    step = (len(text) - piece) // 3
    return "\n".join(text[start : start + piece] for start in (0, step, 2 * step, len(text) - piece))


def in_english(document: Document) -> bool:
    """Whether rules for English apply: the language is English, or unknown and the script mostly Latin."""
    language: Any = document.metadata.get("language")
    probability: Any = document.metadata.get("language_probability", 1.0)
    uncertain = isinstance(probability, int | float) and probability < CERTAIN
    if isinstance(language, str) and language not in ("", "und", "zxx") and not uncertain:
        return _ENGLISH.match(language) is not None
    part = sample_text(document.text, 4000)
    return 2 * len(_LATIN.findall(part)) >= sum(map(str.isalpha, part))
