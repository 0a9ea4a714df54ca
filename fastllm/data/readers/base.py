"""What every reader is: a source of records, each of which becomes a document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import UserError
from ..document import Document, Kind

TEXT_LIMIT = 64 * 2**20  # bytes of one record: a line, a table's cell, a book


@dataclass(frozen=True)
class ReaderOptions:
    """How sources are read."""

    text_column: str = "text"  # of JSONL, Parquet and Hugging Face data sets
    document: int = 2**20  # a text file is cut into documents of at most this many characters
    cache: str = ""  # where downloads are kept; none: $FASTLLM_CACHE, or ~/.cache/fastllm/downloads

    def __post_init__(self) -> None:
        if not self.text_column:
            raise UserError("readers.text_column is empty")
        if self.document < 1:
            raise UserError(f"readers.document must be greater than 0, it is {self.document}")


class Skipped(Exception):
    """A record that is passed over, for a reason that is short and countable: "not HTML".

    ``where`` is given for damage, as ``line 7, byte 1,234``: it is then a problem to tell, not only one to count.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason, where)  # both, so that it can be pickled
        self.reason, self.where = reason, where

    def __str__(self) -> str:
        return self.reason


class Log(Protocol):
    """What no document can tell."""

    def skipped(self, reason: str, n: int = 1) -> None:
        """``n`` records are passed over, by kind: "request record"."""
        ...

    def problem(self, where: str, message: str) -> None:
        """Damage at ``where`` ("byte 123,456"); reading goes on where it can."""
        ...


class Source(Protocol):
    """A file or a data set. It can be pickled: worker processes get it."""

    @property
    def name(self) -> str:
        """As the user named it, or found in a folder that the user named."""
        ...

    @property
    def kind(self) -> Kind: ...

    @property
    def format(self) -> str:
        """``warc``, ``wet``, ``mediawiki``, ``epub``, ``gutenberg``, ``jsonl``, ``parquet``, ``hf``, ``text``."""
        ...

    def records(self, log: Log) -> Iterator[Any]:
        """Records in their order, cheap to make and of bounded size; they can be pickled."""
        ...

    def extract(self, record: Any) -> Document:
        """The document of a record, a pure function; raises :class:`Skipped` where the record has none."""
        ...


@dataclass(frozen=True)
class FileSource:
    """What sources that are files have in common."""

    name: str  # for people
    path: str
    options: ReaderOptions


def without_surrogates(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def words(text: str) -> frozenset[str]:
    """The words of ``text``: names are listed more legibly so."""
    return frozenset(text.split())
