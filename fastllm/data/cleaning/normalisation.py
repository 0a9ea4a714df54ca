"""Normalisation: the same text gets the same characters."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from ..document import Document
from .filter import Filter, Judge

_LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029")
_CONTROLS = bytes((*range(9), *range(11, 32), 127))
_REMOVED = (
    _CONTROLS.decode()
    + "".join(map(chr, range(0x80, 0xA0)))
    + ("\xad\u200b\u2060\u2061\u2062\u2063\u2064\ufeff\ufff9\ufffa\ufffb\ufffe\uffff")
)
_JOINERS = "\u200c\u200d"
_PLAIN = "\x00-\x7f\xa0\u037e\u1fef\u212a"  # nothing that a joiner joins; NFC makes the last three ASCII
_LONE_JOINERS = re.compile(
    f"(?<![{_JOINERS}])(?:(?<![^{_PLAIN}])[{_JOINERS}]++|[{_JOINERS}]++(?![^{_PLAIN}]))"
)  # fmt: skip
_MOST_MARKS = 30  # of one character, as in the Stream-Safe Text Format of Unicode Standard Annex 15
_NO_LETTERS = re.compile(rf"[^\w\s]{{{_MOST_MARKS + 1}}}")


@dataclass(frozen=True)
class Normalisation(Filter):
    """Unicode NFC, line ends, and no characters that nobody sees. Drops what then has no text.

    - Line ends (CR LF, CR, vertical tab, form feed, NEL, U+2028, U+2029) become a line feed.
    - Removed: other control characters but tab, soft hyphens, zero-width spaces, word joiners, byte order marks,
      noncharacters. The joiners U+200C and U+200D stay between characters that are not ASCII: Persian, Indic scripts
      and emoji need them. So do the marks of direction.
    - Halves of a surrogate pair are joined, a lone half becomes U+FFFD.
    - Of more than 30 combining marks on one character, 30 stay: the time that NFC takes is quadratic in them.

    Text in a wrong character set ("Ã©") is left alone: to guess is to damage text that is right.
    The figure is the number of characters by which the text became shorter.
    """

    name: ClassVar[str] = "normalisation"
    kinds: tuple[str, ...] = ("web", "wiki", "book", "table", "text")

    def build(self) -> Judge:
        def judge(document: Document) -> str:
            text = normalise(document.text)
            if len(text) != len(document.text):
                document.metadata[self.name] = {"removed": len(document.text) - len(text)}
            document.text = text
            return "" if text and not text.isspace() else "normalisation: no text"

        return judge


def normalise(text: str) -> str:
    """The text in the form that Normalisation describes. A second call changes nothing."""
    if text.isascii():
        if any(end in text for end in ("\r", "\x0b", "\x0c")):
            text = _with_line_feeds(text)
        kept = text.encode("ascii").translate(None, _CONTROLS)
        return text if len(kept) == len(text) else kept.decode("ascii")
    # What is removed or replaced is not printable: one fast look shows that most texts have nothing of it.
    if not text.replace("\n", " ").replace("\t", " ").replace("\xa0", " ").isprintable():
        text = _without_invisible(text)
        if text.isascii():
            return text
    text = _without_excess_marks(text)
    if unicodedata.is_normalized("NFC", text):
        return text
    return _without_excess_marks(unicodedata.normalize("NFC", text))  # again: NFC takes some marks apart


def _with_line_feeds(text: str) -> str:
    for end in _LINE_ENDS:
        if end in text:
            text = text.replace(end, "\n")
    return text


def _without_invisible(text: str) -> str:
    text = _with_line_feeds(text)
    for char in _REMOVED:
        if char in text:
            text = text.replace(char, "")
    if any(joiner in text for joiner in _JOINERS):
        text = _LONE_JOINERS.sub("", text)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _without_excess_marks(text: str) -> str:
    # Among every 31st character is one of any run of 31 marks; then most texts have no such run at all.
    mark, excess = _marks()
    if mark.search(text[:: _MOST_MARKS + 1]) and _NO_LETTERS.search(text):
        return excess.sub(r"\1", text)
    return text


@cache
def _marks() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A combining mark, and a run of them that is too long."""
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]"), re.compile(f"([{marks}]{{{_MOST_MARKS}}})[{marks}]++")
