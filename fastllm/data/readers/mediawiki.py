"""Dumps of MediaWiki, as Wikipedia's: the pages of the article namespace as plain text."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

from ...errors import require_packages
from ...input_files import one_line
from ..document import Document, Kind
from .base import FileSource, Log, Skipped
from .streams import blocks
from .wikitext import plain_text

PAGE_LIMIT = 16 * 2**20  # bytes of a page's text in the file; MediaWiki's own limit is 2 MiB ($wgMaxArticleSize)
_DECLARATION = re.compile(rb"<!(?:DOCTYPE|ENTITY)")
_ENCODING = re.compile(rb"<\?xml[^>]{0,200}encoding\s*=\s*[\"']([\w.-]+)")
_REDIRECT = re.compile(r"\s*#[^\W\d_]{3,30}\s*:?\s*\[\[")  # "#REDIRECT [[", in any language


# What mwxml raises, beside its own MalformedXML, where an element is not as the schema has it.
_ODD = (AssertionError, AttributeError, KeyError, TypeError, ValueError)


class Record(NamedTuple):
    title: str
    id: str
    date: str
    wikitext: str


@dataclass(frozen=True)
class MediaWikiSource(FileSource):
    format: str = "mediawiki"

    @property
    def kind(self) -> Kind:
        return "wiki"

    def records(self, log: Log) -> Iterator[Record]:
        from mwxml.element_iterator import ElementIterator
        from mwxml.errors import MalformedXML
        from mwxml.iteration.page import Page

        logging.getLogger("mwxml").setLevel(logging.ERROR)
        file, site = _Guarded(self.path, log), None
        try:
            root = ElementIterator.from_file(file)
            for element in root:
                if element.tag == "siteinfo":
                    site = _namespaces(element, log)
                elif element.tag == "page":
                    try:
                        record = _record(Page.from_element(element, site), log)
                    except (MalformedXML, *_ODD) as error:
                        log.problem(f"byte {file.place:,} of the content", f"a page before it: {one_line(error)}")
                        record = None
                    if record:
                        yield record
                root.element.clear()  # ElementTree would keep an element of each page
        except _Refused as error:
            log.problem(f"byte {file.place:,} of the content", f"{error}; what follows is left out")
        except (ParseError, RecursionError) as error:
            if not file.broken:
                log.problem(f"byte {file.place:,} of the content or before", f"not well-formed XML: {one_line(error)}")

    def extract(self, record: Record) -> Document:
        text = plain_text(record.wikitext)
        if not text:
            raise Skipped("no text")
        known = {"title": record.title, "date": record.date}
        return Document(text, self.name, self.kind, record.id, {key: value for key, value in known.items() if value})


def _namespaces(element: Any, log: Log) -> dict[str, Any] | None:
    """The namespaces by name, by which mwxml knows those of pages without a number (dumps until 2011)."""
    from mwxml.errors import MalformedXML
    from mwxml.iteration.site_info import SiteInfo

    try:
        found = SiteInfo.from_element(element).namespaces
    except (MalformedXML, *_ODD) as error:
        log.problem("the siteinfo", f"its namespaces can't be read: {one_line(error)}")
        return None
    return None if found is None else {namespace.name: namespace for namespace in found}


def _record(page: Any, log: Log) -> Record | None:
    """The last revision of a page; none where it is no article."""
    if page.namespace != 0:
        log.skipped("page of another namespace")
        return None
    if page.redirect:
        log.skipped("redirect")
        return None
    text, date = "", ""
    for revision in _revisions(page):
        main = revision.slots.contents.get("main") if revision.slots else None
        text = (main.text or "") if main and main.model in (None, "wikitext") else ""
        date = revision.timestamp.strftime("%Y-%m-%dT%H:%M:%SZ") if revision.timestamp else ""
    if not text.strip():
        log.skipped("page without wikitext")
    elif _REDIRECT.match(text):
        log.skipped("redirect")
    else:
        return Record(page.title, str(page.id), date, text)
    return None


def _revisions(page: Any) -> Iterator[Any]:
    from mwxml.errors import MalformedXML

    try:
        yield from page
    except MalformedXML as error:
        if "<upload>" not in str(error):  # of a file's page it comes behind the revisions, which mwxml does not know
            raise


class _Refused(Exception):
    pass


class _Guarded(io.RawIOBase):
    """The file as the XML parser may see it: no document type, so no entities; text of a bounded length; UTF-8."""

    def __init__(self, path: str, log: Log) -> None:
        self._blocks, self._log = blocks(path, log), log
        self._tail = b""  # the end of the block before, in which a declaration may begin
        self._run = 0  # bytes since the last "<"
        self.place = 0
        self.broken = False  # damage ended the file; it is told already

    def read(self, size: int = -1) -> bytes:
        block = next(self._blocks, b"")
        if block is None:
            self.broken = True
            return b""
        if not self.place:
            declared = _ENCODING.search(block[:1024])
            if b"\0" in block[:64] or (declared and declared[1].lower() not in (b"utf-8", b"utf8", b"us-ascii")):
                raise _Refused("the XML is not UTF-8")
        if _DECLARATION.search(self._tail + block):
            raise _Refused("the XML declares a document type or entities, which no dump of MediaWiki does")
        self._tail = (self._tail + block)[-10:]
        self.place += len(block)
        return self._bounded(block)

    def _bounded(self, block: bytes) -> bytes:
        """``block`` without what is too long between two tags."""
        first, last = block.find(b"<"), block.rfind(b"<")
        run, self._run = self._run, self._run + len(block) if last < 0 else len(block) - last
        text = block if first < 0 else block[:first]
        if run + len(text) <= PAGE_LIMIT:
            return block
        if run <= PAGE_LIMIT:
            message = f"a text of more than {PAGE_LIMIT >> 20} MiB is cut"
            self._log.problem(f"byte {self.place:,} of the content or before", message)
            text = text[: PAGE_LIMIT - run]
            text = text[: text.rfind(b"&", -12)] if b"&" in text[-12:] else text
            kept = text.decode(errors="ignore").encode()
        else:
            kept = b""
        return kept + (b" " if first < 0 else block[first:])


def require() -> None:
    """Raise UserError where the packages are not installed."""
    require_packages("reading MediaWiki dumps", "mwxml", "mwparserfromhell")
