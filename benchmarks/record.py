"""A result file: rows of times, errors against float64, the machine's limits, and where all of it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastllm.errors import UserError
from fastllm.files import write_atomic

VERSION = 1
FILE = "results.json"
FOLDER = Path(__file__).parent / "results"


@dataclass
class Row:
    """One implementation of one case. Seconds are of a call: the median, and the quartiles about it."""

    op: str
    size: str
    direction: str
    dtype: str
    implementation: str
    work: float  # bytes, operations or tokens, as ``unit`` says
    unit: str
    seconds: float = 0.0  # 0: it failed, with ``error``
    low: float = 0.0
    high: float = 0.0
    rounds: int = 0
    host: float | None = None  # seconds to enqueue a call on a GPU; None: on a CPU, or the call waits for the GPU
    memory: int | None = None  # bytes at the peak, beyond what was there before
    error: str = ""
    sweep: str = ""
    at: int = 0
    commit: str = ""  # where it is not that of the file

    @property
    def case(self) -> tuple[str, str, str, str, str]:
        return self.op, self.size, self.direction, self.dtype, self.sweep


@dataclass
class Error:
    """The largest error of one output against float64, of a backend and of PyTorch in the same dtype.

    None: the call failed, and ``output`` is its message; ``within`` too: the backend does not take the dtype.
    """

    op: str
    dtype: str
    backend: str
    output: str
    error: float | None
    pytorch: float | None
    within: bool | None  # the rule of accuracy.py


@dataclass
class Result:
    """All that one run found."""

    stamp: dict[str, str]
    peaks: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)  # in their order

    def __post_init__(self) -> None:
        self.ops = list(dict.fromkeys([*self.ops, *(row.op for row in self.rows)]))

    def keep(self, earlier: Result) -> None:
        """What an earlier run found, with the commit that it ran on, until there is something newer."""
        commit = earlier.stamp["commit"]
        self.peaks, self.ops, self.errors = earlier.peaks, earlier.ops, earlier.errors
        self.rows = [replace(row, commit=row.commit or commit) for row in earlier.rows]

    def forget(self, ops: tuple[str, ...]) -> None:
        """What is kept of these."""
        self.rows = [row for row in self.rows if not (row.commit and row.op in ops)]

    def add(self, rows: list[Row]) -> None:
        """In place of what is there of the same case."""
        cases = {(row.case, row.at) for row in rows}
        self.rows = [row for row in self.rows if (row.case, row.at) not in cases] + rows
        self.ops = list(dict.fromkeys([*self.ops, *(row.op for row in rows)]))

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, **_short(asdict(self))}, indent=1) + "\n"
        write_atomic(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> Result:
        try:
            found = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from error
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise UserError(f"{path} is no result file of version {VERSION}")
        rows = [Row(**{k: v for k, v in row.items() if k in _ROW}) for row in found["rows"]]
        return cls(found["stamp"], found["peaks"], rows, [Error(**error) for error in found["errors"]], found["ops"])

    def by_case(self, *, sweep: bool = False) -> dict[tuple[str, ...], list[Row]]:
        """Rows of a case together, those of the curves or the others."""
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            if bool(row.sweep) == sweep:
                cases.setdefault(row.case, []).append(row)
        return cases


_ROW = {f.name for f in fields(Row)}


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing, and times to four digits more than their spread tells."""
    rows = []
    for row in result["rows"]:
        row = {k: v for k, v in row.items() if v not in ("", None) and (k, v) != ("at", 0)}
        rows.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
    return {**result, "rows": rows}


def committed() -> Iterator[tuple[Path, Result]]:
    """Each device's folder in benchmarks/results/, and what it holds."""
    for path in sorted(FOLDER.glob(f"*/{FILE}")):
        yield path.parent, Result.read(path)


def find(rows: Iterable[Row], implementation: str) -> Row | None:
    return next((r for r in rows if r.implementation == implementation and not r.error), None)


def best(rows: Iterable[Row], kind: Callable[[str], bool]) -> Row | None:
    """The fastest implementation of a kind that leaves its inputs as they are."""
    those = (r for r in rows if kind(r.implementation) and not r.error and "in place" not in r.implementation)
    return min(those, key=lambda r: r.seconds, default=None)
