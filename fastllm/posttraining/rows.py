"""Rows of files of post-training data, and the account of what was kept and dropped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..data.readers.base import TEXT_LIMIT
from ..data.readers.streams import compression, head, lines, open_file
from ..errors import UserError, require_packages
from ..input_files import one_line, read_bytes, shown

SHOWN = 3  # places of each reason
LIST_LIMIT = 2**30  # bytes of a .json file, which is read as a whole
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

DAMAGED = "the line can't be read"
NOT_UTF8, NOT_JSON, NOT_OBJECT = "not UTF-8", "not JSON", "no JSON object"
TOO_DEEP, SURROGATE = "nested too deeply", "not Unicode text"


class Row(NamedTuple):
    """An object of a file; ``where``: its place, such as "chats.jsonl:12"."""

    where: str
    values: dict[str, Any]


class Report:
    """Counts of rows kept, of those dropped by reason, and of what was changed in rows that were kept."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def keep(self) -> None:
        self.kept += 1

    def drop(self, where: str, reason: str, detail: str = "") -> None:
        """The row at ``where`` is not used. ``detail``: what is special about this one."""
        self.dropped[reason] += 1
        self._place(reason, where, detail)

    def note(self, where: str, what: str) -> None:
        """The row at ``where`` is used, but not as it stands."""
        self.notes[what] += 1
        self._place(what, where, "")

    def _place(self, reason: str, where: str, detail: str) -> None:
        places = self._places.setdefault(reason, [])
        if len(places) < SHOWN:
            places.append(f"{where}: {detail}" if detail else where)

    @property
    def read(self) -> int:
        return self.kept + self.dropped.total()

    def lines(self) -> list[str]:
        """What to tell the user."""
        found = [f"{self.kept:,} of {self.read:,} rows are used"]
        for counts, what in ((self.dropped, "dropped"), (self.notes, "changed")):
            for reason, count in counts.most_common():
                places = self._places[reason]
                more = ", …" if count > len(places) else ""
                found.append(f"{what} {count:,}: {reason} ({'; '.join(places)}{more})")
        return found

    def as_dict(self) -> dict[str, Any]:
        """The counts, as JSON can hold them."""
        return {"read": self.read, "kept": self.kept, "dropped": dict(self.dropped), "notes": dict(self.notes)}

    def require_any(self, paths: Iterable[str | Path]) -> None:
        """Raise UserError where nothing is left."""
        if not self.kept:
            why = "; ".join(self.lines()[1:]) or "there are no rows"
            raise UserError(f"nothing is left of {', '.join(map(str, paths))}: {why}")


def read_rows(path: str | Path, report: Report) -> Iterator[Row]:
    """The objects of a file, or of those of a folder by their names: JSON lines (may be compressed), a list in a .json
    file, or Parquet. Lines that are none are dropped.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if any(s in SUFFIXES for s in p.suffixes) and p.is_file())
        if not names:
            raise UserError(f"{path} has no files of the kinds {', '.join(SUFFIXES)}")
        for name in names:
            yield from read_rows(name, report)
        return
    try:
        with open_file(path):
            pass
        start = head(path, 64)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or one_line(error)}") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if start.startswith(b"PAR1"):
        yield from _parquet(path, report)
    elif start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and compression(start) is None:
        yield from _list(path, report)
    else:
        yield from _lines(path, report)


def _lines(path: Path, report: Report) -> Iterator[Row]:
    for number, _, line in lines(path, _Named(report, path), TEXT_LIMIT):
        if line.strip():
            where = f"{path.name}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report.drop(where, NOT_UTF8, f"byte {error.start}")
            except RecursionError:
                report.drop(where, TOO_DEEP)
            except ValueError as error:
                report.drop(where, NOT_JSON, one_line(error))
            else:
                yield from _row(where, value, report)


def _list(path: Path, report: Report) -> Iterator[Row]:
    try:
        values = json.loads(read_bytes(path, LIST_LIMIT).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    for number, value in enumerate(values, 1):
        yield from _row(f"{path.name}[{number - 1}]", value, report)


def _row(where: str, value: Any, report: Report) -> Iterator[Row]:
    if not isinstance(value, dict):
        report.drop(where, NOT_OBJECT, shown(value))
    elif not _is_unicode(value):
        report.drop(where, SURROGATE, "half a surrogate pair")
    else:
        yield Row(where, value)


def _is_unicode(value: Any) -> bool:
    """Whether no text in ``value``, which is of JSON, has half a surrogate pair."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                return False
        elif isinstance(value, dict):
            left += (*value.keys(), *value.values())
        elif isinstance(value, list):
            left += value
    return True


def _parquet(path: Path, report: Report) -> Iterator[Row]:
    require_packages("reading Parquet", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_file(path) as file:
            row = 0
            for batch in ParquetFile(file).iter_batches(256):
                for values in batch.to_pylist():
                    yield from _row(f"{path.name} row {row}", _without_nulls(values), report)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or damaged: {one_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Without the keys that have no value: a table gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


class _Named:
    """The report, for the reader of a file's lines."""

    def __init__(self, report: Report, path: Path) -> None:
        self._report, self._name = report, os.path.basename(path)

    def skipped(self, reason: str, n: int = 1) -> None:
        self._report.dropped[reason] += n

    def problem(self, where: str, message: str) -> None:
        self._report.drop(f"{self._name}, {where}", DAMAGED, message)
