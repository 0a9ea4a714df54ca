"""Books as EPUB: the chapters in the order of the spine, without cover, navigation and licence."""

from __future__ import annotations

import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

from ...errors import UserError
from ...input_files import one_line
from ..document import Document, Kind
from . import gutenberg, html
from .base import TEXT_LIMIT, FileSource, Log, Skipped, words
from .streams import open_file

CHAPTER_LIMIT = 16 * 2**20  # bytes of a file in the book, whatever the zip's directory says
MOST_FILES = 20_000
_FONT_ENCRYPTIONS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_NO_CONTENT = re.compile(
    r"(?:^|[-_.\d])(?:cover|nav|toc|contents|title-?page|copyright|licen[cs]e|colophon|imprint|legal|wrap\d*)"
    r"(?:[-_.]?\w{0,4})?\.x?html?$",
    re.IGNORECASE,
)
_NO_CONTENT_TYPES = words(
    "cover toc landmarks titlepage title-page copyright-page imprint colophon index loi lot page-list"
)
_BODY_TYPE = re.compile(r"<(?:body|section|nav)\b[^>]*\bepub:type\s*=\s*[\"']([^\"']*)[\"']", re.IGNORECASE)
_EMPTY_ELEMENT = re.compile(r"<([A-Za-z][\w:.-]*)((?:\s[^<>]*?)?)/>")  # of XML; HTML takes it for a start
_VOID = words("area base br col embed hr img input link meta param source track wbr")


class Record(NamedTuple):
    metadata: dict[str, str]
    chapters: list[bytes]


@dataclass(frozen=True)
class EpubSource(FileSource):
    format: str = "epub"

    @property
    def kind(self) -> Kind:
        return "book"

    def records(self, log: Log) -> Iterator[Record]:
        try:
            with open_file(self.path) as file, zipfile.ZipFile(file) as book:
                yield _read(book, log)
        except _Unreadable as error:
            log.problem("the book", str(error))
        except _ZIP_ERRORS as error:
            log.problem("the book", f"the zip file is damaged: {one_line(error)}")

    def extract(self, record: Record) -> Document:
        texts = []
        for content in record.chapters:
            page = _EMPTY_ELEMENT.sub(_as_html, html.decode(content, None))
            types = _BODY_TYPE.search(page)
            if not types or not _NO_CONTENT_TYPES.intersection(types[1].lower().split()):
                texts.append(html.all_text(page))
        text = "\n\n".join(filter(None, texts))
        if gutenberg.MARK.search(text[:100_000].encode()):
            text = gutenberg.cut(text)[0]
        if not text:
            raise Skipped("no text")
        return Document(text, self.name, self.kind, "0", dict(record.metadata))


class _Unreadable(Exception):
    """Why a book can't be read."""


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, ValueError, RuntimeError)


def check(file: BinaryIO) -> bool:
    """Whether a zip file is an EPUB; UserError where it is one that is encrypted, or damaged."""
    try:
        with zipfile.ZipFile(file) as book:
            names = book.namelist()
            if "META-INF/container.xml" not in names:
                return False
            _check_rights(book)
    except _Unreadable as error:
        raise UserError(f"can't be read: {error}") from None
    except _ZIP_ERRORS as error:
        raise UserError(f"is a damaged zip file: {one_line(error)}") from None
    return True


def _check_rights(book: zipfile.ZipFile) -> None:
    names = set(book.namelist())
    if len(names) > MOST_FILES:
        raise _Unreadable(f"it has {len(names):,} files: more than {MOST_FILES:,}")
    if "META-INF/encryption.xml" in names:
        listed = re.findall(
            rb"EncryptionMethod[^>]*Algorithm\s*=\s*[\"']([^\"']+)", _member(book, "META-INF/encryption.xml")
        )
        if any(name.decode("latin-1") not in _FONT_ENCRYPTIONS for name in listed):
            raise _Unreadable("the book is encrypted (DRM)")
    if any(entry.flag_bits & 1 for entry in book.infolist()):
        raise _Unreadable("the book is encrypted (a zip file with a password)")


def _read(book: zipfile.ZipFile, log: Log) -> Record:
    _check_rights(book)
    container = _xml(_member(book, "META-INF/container.xml"))
    path = next((e.get("full-path", "") for e in container.iter() if _name(e) == "rootfile"), "")
    package = _xml(_member(book, path))
    items = {e.get("id"): e for e in package.iter() if _name(e) == "item"}
    folder = posixpath.dirname(path)
    left_out = {
        posixpath.normpath(posixpath.join(folder, unquote(e.get("href", "").partition("#")[0])))
        for e in package.iter()
        if _name(e) == "reference" and e.get("type", "").lower() in _NO_CONTENT_TYPES
    }
    chapters, size, seen = list[bytes](), 0, set[str]()
    for reference in (e for e in package.iter() if _name(e) == "itemref"):
        item = items.get(reference.get("idref"))
        if item is None:
            log.problem("the spine", f"it names {reference.get('idref')!r}, which the book has not")
            continue
        name = posixpath.normpath(posixpath.join(folder, unquote(item.get("href", "").partition("#")[0])))
        properties = item.get("properties", "").split()
        if reference.get("linear") == "no" or {"nav", "cover-image"}.intersection(properties) or name in seen:
            continue
        seen.add(name)
        if (
            "html" not in item.get("media-type", "html")
            or name in left_out
            or _NO_CONTENT.search(name.rpartition("/")[2])
        ):
            continue
        try:
            content = _member(book, name)
        except (_Unreadable, *_ZIP_ERRORS) as error:
            log.problem(name, one_line(error))
            continue
        size += len(content)
        if size > TEXT_LIMIT:
            log.problem(name, f"the book is cut here: its chapters have more than {TEXT_LIMIT >> 20} MiB")
            break
        chapters.append(content)
    known: dict[str, str] = {}
    for e in package.iter():
        if (name := {"title": "title", "creator": "author", "language": "book_language"}.get(_name(e), "")) and e.text:
            known.setdefault(name, " ".join(e.text.split()))
    return Record(known, chapters)


def _member(book: zipfile.ZipFile, name: str) -> bytes:
    """A file in the book. What it unpacks to is bounded, and not believed from the directory."""
    try:
        with book.open(name) as file:
            content = file.read(CHAPTER_LIMIT + 1)
    except KeyError:
        raise _Unreadable(f"it has no {name!r}") from None
    if len(content) > CHAPTER_LIMIT:
        raise _Unreadable(f"{name} has more than {CHAPTER_LIMIT >> 20} MiB")
    return content


def _xml(content: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in content or b"\0" in content:
        raise _Unreadable("its XML declares entities, or is not UTF-8")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise _Unreadable(f"its XML is damaged: {one_line(error)}") from None


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _as_html(match: re.Match[str]) -> str:
    return match[0] if match[1].lower() in _VOID else f"<{match[1]}{match[2]}></{match[1]}>"
