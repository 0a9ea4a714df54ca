"""Cutting long texts into documents at natural places."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

_LINE_ENDS = re.compile(r"[\n\r\f\v\x85\u2028\u2029]\s*")  # and the blank lines and the indentation after one
_HEADING = re.compile(
    r"#{1,3}[ \t]"  # Markdown
    r"|[^\n]{2,80}\n(?:={3,}|-{3,}|\*{3,}|~{3,})[ \t\r]*\n"  # underlined, as in reStructuredText
    r"|(?:chapter|part|book|section|volume|act|scene|canto|chapitre|kapitel|teil|глава|часть)[ \t]+(?:\d+|[ivxlcdm]+\b)"
    r"|第[\d一二三四五六七八九十百千零〇]{1,8}[章回节卷部]"
    r"|\\(?:part|chapter|section)\b|<h[1-3]\b"  # LaTeX and HTML
    r"|(?-i:[A-Z][A-Z0-9 .,:;'’-]{3,70})\r?\n[ \t\r]*\n",  # a line of capitals by itself
    re.IGNORECASE,
)
# Where a line that is too long can be cut, the best first: after a sentence, between words.
_IN_LINE = (
    re.compile(r"[.!?。！？…][\"'”’»」』)\]]*(?:[ \t\u3000]+|(?<=[。！？…」』]))"),
    re.compile(r"\s+|[,;、，；]"),
)


def documents(parts: Iterable[str], size: int) -> Iterator[str]:
    """Cut the text that ``parts`` make up into documents of a quarter of ``size`` to ``size`` characters.

    Joined they are the text. A text of up to ``size`` is one document. Each cut is made at the last of the best
    places that there are: chapters before paragraphs before lines, and inside a line only where it is too long.
    """
    text = ""
    for part in parts:
        text += part
        start = 0
        while len(text) - start > 2 * size:
            stop = natural_place(text, start + size // 4, start + size)
            yield text[start:stop]
            start = stop
        text = text[start:]
    start = 0
    while (left := len(text) - start) > size:  # the last document is no scrap either
        stop = natural_place(text, start + size // 4, start + min(size, left - size // 4))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def natural_place(text: str, low: int, high: int) -> int:
    """The best place to cut ``text`` from ``low`` to ``high``, of equal ones the last."""
    best, place = 0, 0
    for match in _LINE_ENDS.finditer(text, max(low - 1, 0), high):
        lines = match.group().splitlines(keepends=True)
        indented = bool(lines) and lines[-1].splitlines()[0] == lines[-1]
        stop = match.end() - (len(lines[-1]) if indented else 0)
        if text[stop - 1 : stop + 1] == "\r\n":  # the run goes on behind ``high``
            stop -= 1
        rank = _rank(match.group(), len(lines) - indented, indented, text, match.end())
        if stop >= low and rank >= best:
            best, place = rank, stop
    if place:
        return place
    for pattern in _IN_LINE:
        stops = [match.end() for match in pattern.finditer(text, low - 1, high) if match.end() >= low]
        if stops:
            return stops[-1]
    return _between_characters(text, low, high)


def _rank(space: str, breaks: int, indented: bool, text: str, end: int) -> int:
    """How good a place the line ends ``space`` are; they end at ``end``, and text follows."""
    if "\f" in space:
        return 7
    if breaks > 1:
        if not indented and _HEADING.match(text, end):
            return 6
        return 3 if indented else 4 + (breaks > 2)
    return 2 if not indented and text[end : end + 1] not in (")", "]", "}") else 1


def _between_characters(text: str, low: int, high: int) -> int:
    """``high``, or before it where a cut does not part a mark, a modifier or a joiner from its character."""
    for place in range(high, max(low, high - 32), -1):
        around = text[place - 1 : place + 1]
        if "\u200d" not in around and not any(
            unicodedata.category(c)[0] == "M" or "\U0001f3fb" <= c <= "\U0001f3ff" for c in around[1:]
        ):
            return place
    return high
