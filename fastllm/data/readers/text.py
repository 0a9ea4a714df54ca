"""Plain text and code: UTF-8 files, long ones cut into documents."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from ...errors import UserError
from ..document import Document, Kind
from ..documents import documents
from .base import FileSource, Log, words
from .streams import NO_LOG, blocks

CODE_SUFFIXES = words(
    ".css .sql .ipynb .py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt .js .jsx .ts .tsx .rb .php .pl .lua "
    ".r .jl .hs .ml .scala .swift .sh"
)


class Record(NamedTuple):
    id: str
    text: str
    group: str  # of a file that is cut into documents: a hash of the whole


@dataclass(frozen=True)
class TextSource(FileSource):
    kind: Kind = "text"
    format: str = "text"

    def records(self, log: Log) -> Iterator[Record]:
        """The documents that the file is cut into. A file that is not UTF-8 gives none of them."""
        digest = hashlib.blake2b(digest_size=8)
        empty = True
        try:
            for part in decoded(blocks(self.path, log), digest):  # the whole file, for its hash
                empty = empty and not part.strip()
        except NotText as error:
            log.problem(error.where, f"{error}; the file is left out")
            return
        if empty:
            log.skipped("empty file")
            return
        texts = documents(decoded(blocks(self.path, NO_LOG)), self.options.document)
        first, second = next(texts, ""), next(texts, None)
        if second is None:
            yield Record("0", first, "")
            return
        for i, text in enumerate(chain((first, second), texts)):
            yield Record(f"0/{i}", text, digest.hexdigest())

    def extract(self, record: Record) -> Document:
        known = {"group": record.group} if record.group else {}
        return Document(record.text, self.name, self.kind, record.id, known)


class NotText(UserError):
    """Why a file is no text that can be read."""

    def __init__(self, message: str, where: str = "byte 0") -> None:
        super().__init__(message)
        self.where = where


def decoded(parts: Iterator[bytes | None], digest: hashlib.blake2b | None = None) -> Iterator[str]:
    """The text of UTF-8 in parts, without a byte order mark at its begin, up to damage; ``digest`` takes in its bytes.

    Raises:
        NotText: it is not UTF-8, or no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0  # of the next block
    for block in parts:
        if block is None:
            break
        if not place:
            check_encoding(block)
            if block.startswith(codecs.BOM_UTF8):
                block, place = block[3:], 3
        start = place - len(decoder.getstate()[0])
        place += len(block)
        if digest:
            digest.update(block)
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            where = f"byte {start + error.start:,}"
            raise NotText(f"is not UTF-8 text: {where} ({error.reason})", where) from None
    else:
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            where = f"byte {place - len(error.object) + error.start:,}"
            raise NotText(f"is not UTF-8 text: {where} ({error.reason})", where) from None


def check_encoding(block: bytes) -> None:
    """Raise for UTF-16 and UTF-32, and for what is no text by its NULs."""
    for name, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),
        ("UTF-32", codecs.BOM_UTF32_BE),
        ("UTF-16", codecs.BOM_UTF16_LE),
        ("UTF-16", codecs.BOM_UTF16_BE),
    ):
        if block.startswith(mark) and len(block) % len(mark) == 0:
            raise NotText(f"is {name} text: convert it to UTF-8, as iconv -f {name} -t UTF-8 does")
    even, odd = (block[i:4096:2].count(0) / max(len(block[i:4096:2]), 1) for i in (0, 1))
    if len(block) >= 4 and even + odd > 0.7:
        if min(even, odd) < 0.1:
            name = "UTF-16LE" if odd > even else "UTF-16BE"
            raise NotText(f"is {name} text: convert it to UTF-8, as iconv -f {name} -t UTF-8 does")
        raise NotText("is not text: it has more zero bytes than text can have")
