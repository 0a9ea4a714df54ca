"""Files that the stages of deduplication hand on: a header, the rows of one array, a checksum over them.

A file is complete or not there. Whoever opens one reads it through once and gets the rows memory-mapped, or a UserError
that names the file: a truncated or changed file never counts as an empty one.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...files import atomic
from ...input_files import open_regular

MAGIC = b"fastllm array 1\n"
HEADER = 1024  # bytes, the magic included


def write_array(
    path: str | Path, kind: str, about: dict[str, Any], dtype: str, width: int, blocks: Iterable[NDArray]
) -> int:
    """Write blocks of rows of ``width`` values to a file and return the number of rows.

    Args:
        kind: what the rows are, a word or two; open_array checks it.
        about: what else the header holds, as JSON.
        dtype: of the values, with its byte order, as ``<u4``.
    """
    rows, checksum = 0, blake2b(digest_size=16)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(bytes(HEADER))
        for block in blocks:
            content = np.ascontiguousarray(block, dtype).reshape(-1, width)
            file.write(content.data)
            checksum.update(content.data)
            rows += len(content)
        header = {"kind": kind, "dtype": dtype, "width": width, "rows": rows, "blake2b": checksum.hexdigest()}
        header["about"] = about
        file.seek(0)
        file.write((MAGIC + json.dumps(header, sort_keys=True).encode()).ljust(HEADER))
    return rows


class Stored:
    """A file of write_array, opened.

    Attributes:
        about: what write_array was told about them.
        rows: its rows, memory-mapped and read-only: ``[rows, width]``.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path = Path(path)
        with open_regular(path, f"{kind} ") as file:
            try:
                header = file.read(HEADER)
                if header[: len(MAGIC)] != MAGIC[: len(header)]:
                    raise UserError(f"{path} holds no {kind}")
                if len(header) < HEADER:
                    self._damaged(f"it is truncated: {len(header):,} bytes of a header of {HEADER:,}")
                known = self._header(header[len(MAGIC) :], kind)
                self.about: dict[str, Any] = known["about"]
                dtype, width, rows = np.dtype(known["dtype"]), known["width"], known["rows"]
                expected, size = HEADER + rows * width * dtype.itemsize, os.fstat(file.fileno()).st_size
                if size != expected:
                    self._damaged(f"it has {size:,} bytes, its header says {expected:,}")
                checksum = blake2b(digest_size=16)
                while content := file.read(1 << 20):
                    checksum.update(content)
                if checksum.hexdigest() != known["blake2b"]:
                    self._damaged("its content does not match its checksum")
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except OSError as error:
                raise UserError(f"can't read {path}: {error.strerror or error}") from error
        self.rows: NDArray[Any] = np.frombuffer(self._map, dtype, offset=HEADER).reshape(rows, width)

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} is damaged: {what}; delete it, and the next run writes it again")

    def _header(self, content: bytes, kind: str) -> dict[str, Any]:
        try:
            header = json.loads(content)
            valid = (
                isinstance(header["about"], dict)
                and isinstance(header["kind"], str)
                and isinstance(header["dtype"], str)
                and np.dtype(header["dtype"]).kind in "iu"
                and all(type(header[key]) is int and 0 <= header[key] < 1 << 48 for key in ("width", "rows"))
            )
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            self._damaged("its header can't be read")
        if header["kind"] != kind:
            raise UserError(f"{self.path} holds {header['kind']}, not {kind}")
        return header

    def release(self) -> None:
        """Let go of the memory that the rows read so far take; they are read again where they are used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Rows:
    """The rows of several arrays of one width, numbered through in the order of the arrays."""

    def __init__(self, parts: Sequence[NDArray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, numbers: NDArray[np.int64] | list[int]) -> NDArray:
        """Those rows."""
        if len(self.parts) == 1:
            return self.parts[0][numbers]
        numbers = np.asarray(numbers, np.int64)
        sources = np.searchsorted(self.starts, numbers, "right") - 1
        out = np.empty((len(numbers), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for source in np.unique(sources):
            here = sources == source
            out[here] = self.parts[source][numbers[here] - self.starts[source]]
        return out

    def blocks(self, size: int) -> Iterator[tuple[int, NDArray]]:
        """All rows in order, at most ``size`` at once, with the number of the first."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for i in range(0, len(part), size):
                yield int(start) + i, part[i : i + size]


def equal_runs(keys: NDArray[np.uint64], bits: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Rows whose keys agree in all but the last ``bits`` bits, which hold the number of the row.

    The keys are sorted in place. Returns the numbers of the rows that have an equal, and for each the number of its
    group; the rows of a group stand together and in order.
    """
    keys.sort()
    equal = np.zeros(len(keys) + 1, np.bool_)  # equal[i]: key i and the one before it agree
    for i in range(1, len(keys), 1 << 18):
        stop = min(i + (1 << 18), len(keys))
        equal[i:stop] = (keys[i:stop] ^ keys[i - 1 : stop - 1]) >> np.uint64(bits) == 0
    member = equal[:-1] | equal[1:]
    rows = keys[member] & np.uint64((1 << bits) - 1)
    return rows, np.cumsum(~equal[:-1][member]) - 1
