"""HTML as bytes to its text: character set, title, main content."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from ...errors import require_packages
from .base import Skipped

if TYPE_CHECKING:
    from resiliparse.parse.html import HTMLTree

DEEPEST = 2000  # <div>s in each other: the search for the main content takes time with the square of it
MOST_ATTRIBUTES = 2000  # of one element, likewise
LONG_TAG = 2**13  # characters of an element with its attributes that is looked at
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_BETWEEN_ATTRIBUTES = re.compile(r"[\s/]+")
_BLOCKS = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)
_BLOCK_BEGINS = ("<d", "<D", "<ar", "<aR", "<Ar", "<AR")  # counted first: the pattern is slower
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*\n")

# What web pages call by the first name is, as browsers read it, the second.
_PYTHON_NAMES = {"shift_jis": "cp932", "euc-kr": "cp949", "gbk": "gb18030", "gb2312": "gb18030", "big5": "big5hkscs"}
_SEVEN_BITS = frozenset(("iso-2022-jp", "utf-16le", "utf-16be"))  # whose bytes can be UTF-8 by accident


def decode(body: bytes, charset: str | None) -> str:
    """A page's text by its byte order mark, its bytes, the header's ``charset``, its meta element, or by detection.

    Text that is valid UTF-8 is UTF-8, whatever is declared: other text hardly ever is, and declarations often lie.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16le"),
        (codecs.BOM_UTF16_BE, "utf-16be"),
    ):
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    declared = (map_encoding_to_html5(charset, fallback_utf8=False) if charset else None) or ""
    if declared.lower() not in _SEVEN_BITS and b"\x1b$" not in body[:4096]:
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            if error.start > len(body) - 4:  # a page that was cut inside a character
                return body.decode(errors="replace")
    names = [declared, detect_encoding(body, from_html_meta=True) or "", detect_encoding(body) or ""]
    for name in names:
        if name:
            try:
                return body.decode(_PYTHON_NAMES.get(name.lower(), name))
            except (LookupError, UnicodeError):
                continue
    name = next((name for name in reversed(names) if name), "utf-8")
    try:
        text = body.decode(_PYTHON_NAMES.get(name.lower(), name), "replace")
    except LookupError:
        return body.decode("cp1252", "replace")
    if 2 * text.count("\ufffd") > sum(c > "\x7f" for c in text):
        return body.decode("cp1252", "replace")
    return text


def main_text(page: str) -> tuple[str, str]:
    """``(text, title)`` of a web page: what its author wrote, without navigation, scripts and forms.

    The method is Resiliparse's (Bevendorff et al., "Elastic ChatNoir", ECIR 2018; rules on tags, classes and the
    density of links).

    Raises:
        Skipped: the page is built so that it would take very long.
    """
    _check(page)
    from resiliparse.extract.html2text import extract_plain_text

    tree = parse(page)
    text = extract_plain_text(tree, main_content=True, alt_texts=False, comments=False)
    return tidy(text), " ".join((tree.title or "").split())


def all_text(page: str) -> str:
    """The text of a page that is content from begin to end, as a book's chapter is."""
    _check(page)
    from resiliparse.extract.html2text import extract_plain_text

    return tidy(extract_plain_text(parse(page), main_content=False, alt_texts=False, list_bullets=True))


def parse(page: str) -> HTMLTree:
    from resiliparse.parse.html import HTMLTree

    return HTMLTree.parse(page)


def tidy(text: str) -> str:
    """Without soft hyphens, which are for layout, and with at most one blank line at a place."""
    return _BLANK_LINES.sub("\n\n", text.replace("\xad", "")).strip()


def _check(page: str) -> None:
    """Raise Skipped for a page that would take very long; it must cost little on all others."""
    start = 0
    while len(page) - start > LONG_TAG:
        stop = page.rfind(">", start, start + LONG_TAG)
        if stop < 0:
            stop = page.find(">", start)
            part = page[start : stop if stop >= 0 else len(page)]
            tag = _QUOTED.sub("", part[part.find("<") :] if "<" in part else "")
            if len(_BETWEEN_ATTRIBUTES.findall(tag)) > MOST_ATTRIBUTES:
                raise Skipped("HTML element with too many attributes")
            if stop < 0:
                break
        start = stop + 1
    if page.count("<") <= DEEPEST or sum(map(page.count, _BLOCK_BEGINS)) <= DEEPEST:
        return
    depth = 0
    for match in _BLOCKS.finditer(page):
        depth = max(0, depth - 1) if match[1] else depth + 1
        if depth > DEEPEST:
            raise Skipped("HTML nested too deeply")


def require() -> None:
    """Raise UserError where Resiliparse is not installed."""
    require_packages("reading HTML", "resiliparse")
