"""The texts of evaluation files: JSONL, JSON, Parquet, Arrow and plain text, recognised by their content."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from ...errors import UserError, pip_install
from ...input_files import one_line, open_regular

JSON_LIMIT = 1 << 30  # characters of a file that is one JSON value, or of a line
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last begins a stream of Arrow, as `datasets` caches it


def evaluation_texts(path: str | Path) -> Iterator[str]:
    """Each text of a file: each string of each JSON value or table row, however nested; or each paragraph and line.

    Lines count beside their paragraph: they may be questions of their own, or one sentence wrapped. A file may be
    compressed by gzip or zstd.
    """
    with open_regular(path, "evaluation file ") as file:
        try:
            head = file.read(8)
            file.seek(0)
            if head.startswith(TABLES):
                for value in _table_values(path, file, head):
                    yield from strings_of(value)
                return
            stream: IO[bytes] = file
            if head.startswith(b"\x1f\x8b"):
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=file))
            elif head.startswith(b"\x28\xb5\x2f\xfd"):
                stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            yield from _text_file(path, io.TextIOWrapper(io.BufferedReader(cast(io.RawIOBase, stream)), "utf-8-sig"))
        except UnicodeDecodeError:
            raise UserError(f"evaluation file {path} is not UTF-8 text, JSON, Parquet or Arrow") from None
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"can't read evaluation file {path}: {one_line(error)}") from error


def _text_file(path: str | Path, file: io.TextIOBase) -> Iterator[str]:
    first = ""
    number = 0
    while not first.strip():
        first = file.readline(JSON_LIMIT)
        number += 1
        if not first:
            return
    if first.lstrip()[0] not in "{[":
        yield from _paragraphs(chain([first], file))
        return
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        yield from _one_value(path, first + file.read(JSON_LIMIT - len(first)))
        return
    while True:
        yield from strings_of(value)
        line = file.readline(JSON_LIMIT)
        number += 1
        if not line:
            return
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"evaluation file {path}, line {number:,}: not valid JSON: {one_line(error)}") from None


def _one_value(path: str | Path, content: str) -> Iterator[str]:
    """The texts of a file that is one JSON value over several lines; or of a text that begins like one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if any(suffix in (".json", ".jsonl") for suffix in Path(path).suffixes) or len(content) >= JSON_LIMIT:
            raise UserError(f"evaluation file {path} is not valid JSON: {one_line(error)}") from None
        yield from _paragraphs(io.StringIO(content))
        return
    yield from strings_of(value)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            paragraph.append(line)
            yield line
        elif paragraph:
            if len(paragraph) > 1:
                yield "".join(paragraph)
            paragraph = []


def strings_of(value: Any) -> Iterator[str]:
    """The strings in a JSON value, but for the names of fields."""
    open_ = [value]
    while open_:
        value = open_.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            open_.extend(value.values())
        elif isinstance(value, list):
            open_.extend(value)


def _table_values(path: str | Path, file: IO[bytes], head: bytes) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"evaluation file {path} needs pyarrow: {pip_install('data')}") from None
    try:
        if head.startswith(b"PAR1"):
            batches: Iterable[Any] = pyarrow.parquet.ParquetFile(file).iter_batches(1024)
        elif head.startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            for column in batch.columns:
                if pyarrow.types.is_nested(column.type) or not pyarrow.types.is_primitive(column.type):
                    yield from column.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"can't read evaluation file {path}: {one_line(error)}") from error
