"""Parquet files: a row a document, one of the columns the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import UserError, pip_install
from ...input_files import one_line
from ..document import Document, Kind
from .base import TEXT_LIMIT, FileSource, Log, Skipped
from .jsonl import METADATA, document_of
from .streams import open_file

ROWS = 64  # that are decoded at a time


class Record(NamedTuple):
    row: int
    values: dict[str, Any]


@dataclass(frozen=True)
class ParquetSource(FileSource):
    format: str = "parquet"

    @property
    def kind(self) -> Kind:
        return "table"

    def records(self, log: Log) -> Iterator[Record]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        with open_file(self.path) as file:
            try:
                table = ParquetFile(file, buffer_size=2**20, pre_buffer=False)
            except (pyarrow.ArrowException, OSError) as error:
                log.problem("the file", f"it is no Parquet file, or damaged: {one_line(error)}")
                return
            columns = [name for name in table.schema_arrow.names if name in {self.options.text_column, *METADATA}]
            first = 0
            for group in range(table.num_row_groups):
                row = first
                first += table.metadata.row_group(group).num_rows
                try:
                    for batch in table.iter_batches(ROWS, [group], columns):
                        for values in batch.to_pylist():
                            yield Record(row, values)
                            row += 1
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    log.problem(f"row {row:,} (group {group})", f"{one_line(error)}; the rest of the group is left out")

    def extract(self, record: Record) -> Document:
        text = record.values.get(self.options.text_column)
        if isinstance(text, str | bytes) and len(text) > TEXT_LIMIT:
            raise Skipped(f"text of more than {TEXT_LIMIT >> 20} MiB", f"row {record.row:,}")
        return document_of(record.values, self.options.text_column, self.name, str(record.row), f"row {record.row:,}")


def check(path: str, column: str) -> None:
    """Raise UserError where a file is damaged or has no such column of texts."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"reading Parquet needs pyarrow: {pip_install('data')}") from None
    try:
        with open_file(path) as file:
            schema = ParquetFile(file).schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"is no Parquet file, or damaged: {one_line(error)}") from None
    if column not in schema.names:
        known = ", ".join(schema.names[:10]) + (", …" if len(schema.names) > 10 else "")
        raise UserError(f"has no column {column!r}: its columns are {known}; name the one of the text")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _TEXT_TYPES):
        raise UserError(f"holds no text in {column!r}, but {kind}")


_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary")
