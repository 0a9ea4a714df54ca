"""JSON lines: an object a line, one of its keys the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...input_files import one_line
from ..document import Document, Kind
from .base import TEXT_LIMIT, FileSource, Log, Skipped, without_surrogates
from .streams import lines

METADATA = ("url", "title", "date", "timestamp", "language")  # what is taken over from an object or a row


class Record(NamedTuple):
    number: int
    offset: int
    line: bytes


@dataclass(frozen=True)
class JsonlSource(FileSource):
    format: str = "jsonl"

    @property
    def kind(self) -> Kind:
        return "table"

    def records(self, log: Log) -> Iterator[Record]:
        for number, offset, line in lines(self.path, log, TEXT_LIMIT):
            if line.strip():
                yield Record(number, offset, line)

    def extract(self, record: Record) -> Document:
        where = f"line {record.number:,}, byte {record.offset:,}"
        try:
            values = json.loads(record.line.decode("utf-8-sig" if record.number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise Skipped("line that is not UTF-8", where) from None
        except RecursionError:
            raise Skipped("line nested too deeply", where) from None
        except ValueError as error:
            reason = one_line(error).partition(":")[0]
            raise Skipped(f"line that is not JSON ({reason})", where) from None
        if not isinstance(values, dict):
            raise Skipped("line that is no JSON object", where)
        return document_of(values, self.options.text_column, self.name, str(record.number), where)


def document_of(values: Mapping[str, Any], column: str, source: str, id: str, where: str) -> Document:
    """The document of a JSON object or a table's row."""
    text = values.get(column)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise Skipped("text that is not UTF-8", where) from None
    if text is None and column in values:
        raise Skipped("no text")
    if not isinstance(text, str):
        raise Skipped(f"no string in {column!r}", where)
    if not text.strip():
        raise Skipped("no text")
    known = {}
    for key in METADATA:
        if (value := values.get(key)) and isinstance(value, str):
            known["date" if key == "timestamp" else key] = without_surrogates(value)
        elif value and hasattr(value, "isoformat"):
            known["date"] = value.isoformat()
    return Document(without_surrogates(text), source, "table", id, known)
