"""Common Crawl's files: WARC (HTTP responses) and WET (their text).

The records are found here and not by fastwarc's iterator: that ends at the first record whose length is wrong, and
takes a file that was cut for a complete one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..document import Document, Kind
from . import html, http
from .base import FileSource, Log, Skipped
from .streams import blocks

RECORD_LIMIT = 32 * 2**20  # bytes of a record, and of a page without its compression
HEADER_LIMIT = 2**16  # bytes of a record's own header
HTML_TYPES = frozenset(("text/html", "application/xhtml+xml", ""))
_RECORD = re.compile(rb"WARC/\d\.\d\r?\n[A-Za-z-]+[ \t]*:")  # a plain begin: it is searched for fast
_HEADER_END = re.compile(rb"\r?\n\r?\n")


class Record(NamedTuple):
    id: str
    type: str
    url: str
    date: str
    mime: str  # the record's own: application/http, text/plain
    block: bytes


@dataclass(frozen=True)
class WarcSource(FileSource):
    format: str = "warc"

    @property
    def kind(self) -> Kind:
        return "web"

    def records(self, log: Log) -> Iterator[Record]:
        for offset, headers, block in _Reader(self.path, log).records():
            kind, url = headers.get("warc-type", ""), headers.get("warc-target-uri", "").strip("<>")
            mime = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in ("response", "conversion", "resource"):
                log.skipped(f"{kind if re.fullmatch('[a-z]{1,20}', kind) else 'unknown'} record")
            elif mime == "text/dns" or url.startswith("dns:"):
                log.skipped("DNS record")
            elif len(block) < int(headers["content-length"]):
                log.skipped(f"record of more than {RECORD_LIMIT >> 20} MiB")
            else:
                name = headers.get("warc-record-id", "").removeprefix("<urn:uuid:").removesuffix(">")
                date = headers.get("warc-date", "")
                yield Record(name or f"byte {offset}", kind, url, date, mime, block)

    def extract(self, record: Record) -> Document:
        title = ""
        if record.type == "conversion":
            text = record.block.decode(errors="replace").strip()
        else:
            text, title = _page(record)
        if not text.strip():
            raise Skipped("no text")
        known = {"url": record.url, "date": record.date, "title": title}
        return Document(text, self.name, self.kind, record.id, {key: value for key, value in known.items() if value})


def _page(record: Record) -> tuple[str, str]:
    if record.type == "response" and record.mime in ("application/http", ""):
        response = http.parse(record.block)
        if response.status != 200:
            raise Skipped(f"HTTP status {response.status}")
    else:
        response = http.Response(200, {"content-type": record.mime}, record.block)
    if response.mime not in HTML_TYPES:
        raise Skipped("not HTML")
    body = http.decoded_body(response, RECORD_LIMIT)
    if not response.mime and b"<" not in body[:1024]:
        raise Skipped("not HTML")
    return html.main_text(html.decode(body, response.charset))


class _Reader:
    """Finds the records of a file. Behind damage it goes on with the next record that there is."""

    def __init__(self, path: str, log: Log) -> None:
        self._blocks, self._log = blocks(path, log), log
        self._data = bytearray()
        self._start = 0  # where ``_data`` begins in the decompressed file
        self._broken = False  # some of the file is missing behind ``_data``; that is told already
        self._end = False

    def records(self) -> Iterator[tuple[int, dict[str, str], bytes]]:
        """``(offset, headers, block)``; the block is empty where the record is longer than RECORD_LIMIT."""
        while True:
            while self._data.startswith((b"\r", b"\n")):
                self._drop(1)
            if self._data:
                yield from self._record()
            elif self._broken:
                self._broken = False
                self._next_record(0)
            elif not self._fill() and not self._broken:
                return

    def _record(self) -> Iterator[tuple[int, dict[str, str], bytes]]:
        end = self._header_end()
        headers = _headers(bytes(self._data[: end or 0]))
        length = headers.get("content-length", "")
        if not self._data.startswith(b"WARC/"):
            problem = "no WARC record begins here"
        elif not end:
            problem = "" if self._broken else "the record's header has no end"
        elif not re.fullmatch(r"\d{1,15}", length):
            problem = "the record's header has no length"
        else:
            yield from self._block(end, int(length), headers)
            return
        if problem:
            self._problem(problem)
        self._next_record(1)

    def _block(self, end: int, size: int, headers: dict[str, str]) -> Iterator[tuple[int, dict[str, str], bytes]]:
        """The record whose header ends at ``end`` and tells ``size``, if that is true."""
        if size > RECORD_LIMIT:
            yield from self._long_record(end, size, headers)
            return
        whole = self._need(end + size)
        if whole and self._ends_at(end + size):
            offset, block = self._start, bytes(memoryview(self._data)[end : end + size])
            self._drop(end + size)
            yield offset, headers, block
            return
        if not self._broken or whole:
            inside = _find(self._data, end, end + size) >= 0
            self._problem(
                f"the record has {size:,} bytes by its header, but the next one begins before or behind that"
                if whole or inside
                else f"the file ends inside this record: it has {len(self._data) - end:,} of {size:,} bytes"
            )
        self._next_record(end)

    def _long_record(self, end: int, size: int, headers: dict[str, str]) -> Iterator[tuple[int, dict[str, str], bytes]]:
        """Pass over a record that is too long, unless another begins inside it: then its length is wrong."""
        offset, stop = self._start, self._start + end + size
        self._drop(end)
        while self._start < stop:
            inside = _find(self._data, 0, stop - self._start)
            if inside >= 0:
                self._log.problem(
                    f"byte {offset:,} of the content",
                    f"the record has {size:,} bytes by its header, but another begins in it",
                )
                self._drop(inside)
                return
            self._drop(max(0, min(len(self._data) - 256, stop - self._start)))
            if len(self._data) >= stop - self._start:
                self._drop(stop - self._start)
            elif not self._fill():
                if not self._broken:
                    self._log.problem(
                        f"byte {offset:,} of the content",
                        f"the file ends inside this record of {size:,} bytes",
                    )
                self._drop(len(self._data))
                return
        yield offset, headers, b""

    def _header_end(self) -> int:
        """Where the header ends; 0 where it does not."""
        while not (match := _HEADER_END.search(self._data, 0, HEADER_LIMIT)):
            if len(self._data) >= HEADER_LIMIT or not self._fill():
                return 0
        return match.end()

    def _ends_at(self, place: int) -> bool:
        """Whether a record ends there: two line ends follow, or (some writers leave them out) the next record."""
        self._need(place + 16)
        rest = bytes(self._data[place : place + 16])
        if rest.startswith(b"\r\n\r\n"):
            return True
        rest = rest.lstrip(b"\r\n")
        return rest.startswith(b"WARC/"[: len(rest)]) if len(rest) < 5 else rest.startswith(b"WARC/")

    def _next_record(self, place: int) -> None:
        """Go to the next record at ``place`` or behind it."""
        while (start := _find(self._data, place, len(self._data))) < 0:
            passed = max(0, len(self._data) - 256)
            self._drop(passed)
            place = max(0, place - passed)
            if self._fill():
                continue
            self._drop(len(self._data))
            place = 0
            if not self._broken:
                return
            self._broken = False
        self._drop(start)

    def _need(self, size: int) -> bool:
        while len(self._data) < size:
            if not self._fill():
                return False
        return True

    def _fill(self) -> bool:
        """Read a block; False at the end, and before what is missing."""
        if self._broken or self._end:
            return False
        block = next(self._blocks, b"")
        if block is None:
            self._broken = True
        elif not block:
            self._end = True
        else:
            self._data += block
            return True
        return False

    def _drop(self, size: int) -> None:
        del self._data[:size]
        self._start += size

    def _problem(self, message: str) -> None:
        self._log.problem(f"byte {self._start:,} of the content", message)


def _find(data: bytearray, start: int, stop: int) -> int:
    """Where the first line from ``start`` to ``stop`` begins that begins a record; -1 where there is none."""
    while match := _RECORD.search(data, start, stop):
        if not match.start() or data[match.start() - 1] == 10:
            return match.start()
        start = match.end()
    return -1


def _headers(head: bytes) -> dict[str, str]:
    found = {}
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        name, _, value = line.partition(":")
        found[name.strip().lower()] = value.strip()
    return found
