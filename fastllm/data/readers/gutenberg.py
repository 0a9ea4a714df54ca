"""Books of Project Gutenberg, as plain text or HTML, without its header, footer and licence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..document import Document, Kind
from . import html
from .base import TEXT_LIMIT, FileSource, Log, Skipped
from .streams import blocks

MARK = re.compile(rb"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG|\*END[* ]*THE SMALL PRINT!|id=\"pg-header\"")
_START = re.compile(
    r"^[ \t]*\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^*]*\*\*\*[^\n]*\n?|^\*END[* ]*THE SMALL PRINT![^\n]*\n?",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^[ \t]*(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)"
    r"|^[ \t]*START: FULL LICENSE",
    re.MULTILINE | re.IGNORECASE,
)
_CREDITS = re.compile(
    r"\s*(?:Produced by|E-?text prepared by|This e-?text was|Transcribed (?:by|from)|\[?Transcriber's notes?"
    r"|Updated editions? will)\b.*?(?:\n[ \t]*\n|$)",
    re.DOTALL | re.IGNORECASE,
)
_FIELD = re.compile(r"^(Title|Author|Language|Release date):[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class GutenbergSource(FileSource):
    format: str = "gutenberg"

    @property
    def kind(self) -> Kind:
        return "book"

    def records(self, log: Log) -> Iterator[bytes]:
        content = bytearray()
        for block in blocks(self.path, log):
            if block is None:
                break
            content += block
            if len(content) > TEXT_LIMIT:
                log.problem(f"byte {TEXT_LIMIT:,}", f"the book is cut: it has more than {TEXT_LIMIT >> 20} MiB")
                break
        yield bytes(content[:TEXT_LIMIT])

    def extract(self, record: bytes) -> Document:
        content = html.decode(record, None) if b"<" in record[:512] else _decoded(record)
        if re.match(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype html|<html)", content, re.IGNORECASE):
            content = html.all_text(content)
        text, known = cut(content)
        if not text:
            raise Skipped("no text")
        return Document(text, self.name, self.kind, "0", known)


def cut(text: str) -> tuple[str, dict[str, str]]:
    """The book in a file's text, and what the header says of it: ``title``, ``author``."""
    text = text.replace("\r\n", "\n")
    starts = list(_START.finditer(text, 0, 100_000))
    start = starts[-1].end() if starts else 0
    found = {key.lower(): value.strip() for key, value in _FIELD.findall(text[:start])}
    end = _END.search(text, start)
    body = text[start : end.start() if end else len(text)]
    while match := _CREDITS.match(body):
        body = body[match.end() :]
    return body.strip(), {key: value for key, value in found.items() if key in ("title", "author")}


def _decoded(content: bytes) -> str:
    """The oldest files are Latin-1, which some call ISO-646-US."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")
