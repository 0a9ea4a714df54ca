"""Rows of the files that post-training reads, and the report of what was dropped."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..data.chat_template import DEPTH
from ..data.folders import LeftOut, printable, text_files
from ..data.readers.base import TEXT_LIMIT
from ..data.readers.recognise import COMPRESSED_SUFFIXES
from ..data.readers.streams import NO_LOG, blocks, head, lines
from ..errors import UserError, require_packages
from ..input_files import one_line, open_regular, shown
from .rendering import Refused

T = TypeVar("T")

PLACES = 3  # of each reason that a report names
LIST_LIMIT = 2**31  # bytes of a JSON list, which is read whole
BATCH = 64  # rows of a Parquet file that are decoded at a time
BOM = b"\xef\xbb\xbf"
SUFFIXES = frozenset((".jsonl", ".ndjson", ".json", ".parquet"))

# Why a row is dropped, whatever it is used for.
NOT_UTF8, NOT_JSON, NOT_OBJECT = "not UTF-8", "not JSON", "not a JSON object"
TOO_DEEP, SURROGATE, KEY_TWICE = "nested too deep", "half a surrogate pair", "the same key twice"
UNREADABLE = "damaged or too long"
# Notes.
LEFT_OUT = "left out of a folder"


class Row(NamedTuple):
    """An object of JSON values; ``where``: its place, for people."""

    where: str
    values: dict[str, Any]


@dataclass
class Tally:
    """How often something was found, and where first: ``(where, detail)``."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, detail: str) -> None:
        self.count += 1
        if len(self.first) < PLACES:
            self.first.append((where, detail))

    @property
    def places(self) -> list[str]:
        return [f"{where}: {detail}" if detail else where for where, detail in self.first]


class Report:
    """What became of the rows that were read. The readers count what they read and drop; who uses a row keeps it.

    Attributes:
        read, kept: numbers of rows.
        dropped: by the reason.
        notes: on rows that were not dropped, by what is noted.
    """

    def __init__(self) -> None:
        self.read = self.kept = 0
        self.dropped: dict[str, Tally] = {}
        self.notes: dict[str, Tally] = {}

    def keep(self) -> None:
        self.kept += 1

    def drop(self, where: str, reason: str, detail: str = "") -> None:
        self.dropped.setdefault(reason, Tally()).add(where, detail)

    def note(self, where: str, reason: str, detail: str = "") -> None:
        self.notes.setdefault(reason, Tally()).add(where, detail)

    def lines(self) -> list[str]:
        """For people: a line on what was dropped, and one for each note; the most frequent first."""
        found = []
        if count := sum(tally.count for tally in self.dropped.values()):
            found.append(f"dropped {count:,} of {self.read:,}: {', '.join(_described(self.dropped))}")
        return found + _described(self.notes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        dropped, notes = (
            {reason: {"count": tally.count, "first": tally.places} for reason, tally in tallies.items()}
            for tallies in (self.dropped, self.notes)
        )
        return {"read": self.read, "kept": self.kept, "dropped": dropped, "notes": notes}

    def require_any(self, paths: Iterable[str | Path]) -> None:
        """Raise UserError where no row of the files ``paths`` was kept."""
        if not self.kept:
            names = ", ".join(map(printable, paths))
            raise UserError(f"nothing is left of {names}: {self.lines()[0] if self.dropped else 'there are no rows'}")


def _described(tallies: dict[str, Tally]) -> list[str]:
    return [
        f"{tally.count:,} {reason} ({', '.join(tally.places)}{', …' if tally.count > PLACES else ''})"
        for reason, tally in sorted(tallies.items(), key=lambda item: -item[1].count)
    ]


def read_rows(path: str | Path, report: Report) -> Iterator[Row]:
    """The objects of a JSON lines or Parquet file, of a JSON file with a list of them, or of a folder of such files.

    JSON may be compressed with gzip, zstd or bzip2. Inside a Parquet column, where all objects have the same keys,
    those without a value are left out; dates and decimals become texts. Only a JSON list is read whole. Rows that
    can't be read go to the report.

    Places: ``chats.jsonl:12`` is line 12, from 1; ``chats.parquet row 12`` and ``chats.json[12]`` are counted from 0.
    The names of a folder's files begin with the folder's.

    Raises:
        UserError: there is no such file, it can't be read, or its kind is not known.
    """
    root = Path(path)
    if not root.is_dir():
        yield from _file_rows(root, printable(root.name), report)
        return
    left_out = LeftOut()
    files = [file for file in text_files(root, left_out, SUFFIXES | COMPRESSED_SUFFIXES) if _suffix(file) in SUFFIXES]
    if text := str(left_out):
        report.note(printable(root), LEFT_OUT, text)
    if not files:
        raise UserError(f"the folder {printable(root)} has no files of rows: .jsonl, .json or .parquet")
    for file in files:
        yield from _file_rows(file, printable(file.relative_to(root.parent)), report)


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _file_rows(path: Path, name: str, report: Report) -> Iterator[Row]:
    open_regular(path, "the data file ").close()
    suffix = _suffix(path)
    if path.suffix.lower() == ".parquet":
        yield from _parsed(_parquet_rows(path, name, report), _from_arrow, report)
    elif suffix == ".json" and head(path, 2**10).removeprefix(BOM).lstrip().startswith(b"["):
        yield from _parsed(_list_items(path, name), _checked, report)
    elif suffix in SUFFIXES - {".parquet"}:
        yield from _parsed(_json_lines(path, name, report), parse_json, report)
    else:
        raise UserError(f"the data file {printable(path)} is of no known kind: .jsonl, .json or .parquet")


def _parsed(found: Iterator[tuple[str, T]], parse: Callable[[T], Any], report: Report) -> Iterator[Row]:
    for where, content in found:
        report.read += 1
        try:
            values = parse(content)
            if not isinstance(values, dict):
                raise Refused(NOT_OBJECT, shown(values))
        except Refused as refusal:
            report.drop(where, refusal.reason, refusal.detail)
        else:
            yield Row(where, values)


# ---- JSON ----


class _Damage:
    """For the reader of lines: damage to a file goes to the report."""

    def __init__(self, name: str, report: Report) -> None:
        self.name, self.report = name, report

    def skipped(self, reason: str, n: int = 1) -> None: ...

    def problem(self, where: str, message: str) -> None:
        if where == "the file":
            raise UserError(f"the data file {self.name}: {message}")
        line = re.match(r"line ([\d,]+)", where)
        place = f"{self.name}:{line[1].replace(',', '')}" if line else f"{self.name} {where}"
        self.report.read += 1
        self.report.drop(place, UNREADABLE, message)


def _json_lines(path: Path, name: str, report: Report) -> Iterator[tuple[str, bytes]]:
    for number, _, line in lines(path, _Damage(name, report), TEXT_LIMIT):
        content = line.removeprefix(BOM) if number == 1 else line
        if content.strip():
            yield f"{name}:{number}", content


def _list_items(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    content = bytearray()
    for block in blocks(path, NO_LOG):
        if block is None:
            raise UserError(f"the data file {printable(path)} is damaged")
        content += block
        if len(content) > LIST_LIMIT:
            raise UserError(f"{printable(path)} is a list of more than {LIST_LIMIT:,} bytes: make JSON lines of it")
    try:
        items = _decoded(content.removeprefix(BOM))
    except Refused as refusal:
        raise UserError(f"the data file {printable(path)} is {refusal}") from None
    for number, item in enumerate(items):
        yield f"{name}[{number}]", item


class _Ambiguous(dict[str, Any]):
    """How often an object has each key, of which one is there twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _Ambiguous(Counter(key for key, _ in pairs))


def _decoded(content: bytes | bytearray | str) -> Any:
    """The value of a JSON text, not checked; raises Refused where it is none."""
    try:
        text = content if isinstance(content, str) else content.decode()
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Refused(NOT_UTF8, f"byte {error.start:,}") from None
    except RecursionError:
        raise Refused(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise Refused(NOT_JSON, f"{error.msg} at character {error.pos:,}") from None
    except ValueError as error:  # a number of thousands of digits
        raise Refused(NOT_JSON, one_line(error)) from None


def _checked(value: Any, depth: int = 0) -> Any:
    """``value``, if a chat template can take what is in it."""
    if depth > DEPTH:
        raise Refused(TOO_DEEP)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refused(SURROGATE) from None
    elif isinstance(value, list):
        for item in value:
            _checked(item, depth + 1)
    elif isinstance(value, dict):
        if isinstance(value, _Ambiguous):
            raise Refused(KEY_TWICE, shown(next(key for key, count in value.items() if count > 1)))
        for key, item in value.items():
            _checked(key)
            _checked(item, depth + 1)
    return value


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        Refused: it is not JSON, or has what a chat template can't take.
    """
    return _checked(_decoded(content))


# ---- Parquet ----


def _parquet_rows(path: Path, name: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    require_packages("reading Parquet", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with open_regular(path, "the data file ") as file:
        try:
            table = ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{printable(path)} is no Parquet file, or damaged: {one_line(error)}") from None
        first = 0
        for group in range(table.num_row_groups):
            row, first = first, first + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(BATCH, [group]):
                    for values in batch.to_pylist():
                        yield f"{name} row {row}", values
                        row += 1
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                report.read += first - row
                for lost in range(row, first):
                    report.drop(f"{name} row {lost}", UNREADABLE, one_line(error))


def _from_arrow(values: dict[str, Any]) -> dict[str, Any]:
    """A table's row as JSON values."""
    plain: dict[str, Any] = _checked({key: _plain(value) for key, value in values.items()})
    return plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Refused(NOT_UTF8, f"byte {error.start:,} of a value") from None
    return str(value)
