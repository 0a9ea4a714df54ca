"""The first stage: sources become parts, of cleaned documents with their keys and signatures.

One process reads the records of all sources in order, workers clean them, and results are written in the order of the
records: the parts do not depend on the number of processes. A part is complete when its ``.json`` is there; a run that
was killed continues behind the last complete one.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import write_atomic
from ...input_files import one_line, read_json
from ..deduplication import MinHashSettings, write_signatures
from ..readers import Source
from ..workers import end_with_parent, starting
from .recipe import Recipe
from .tally import Tally
from .worker import ROW, Batch, Cleaned, Worker

BATCH = 2**21  # bytes of records that a worker gets at a time,
BATCH_RECORDS = 2048  # and at most so many
PART = 2**26  # bytes of records, about, in a part
AHEAD = 2  # batches for each worker that are read ahead

Files = Sequence[tuple[int, Source]]  # every file, and the number of the recipe's source that it belongs to


@dataclass(frozen=True)
class Part:
    """A complete part. ``end``: the file and record at which the next one begins."""

    folder: Path
    number: int
    documents: int
    end: tuple[int, int]

    @property
    def _name(self) -> str:
        return f"{self.number:05}"

    @property
    def lines(self) -> Path:
        return self.folder / f"{self._name}.jsonl.zst"

    @property
    def signatures(self) -> Path:
        return self.folder / f"{self._name}.signatures"

    def rows(self) -> np.ndarray:
        """ROW ``[documents]``, memory-mapped."""
        return np.load(self.folder / f"{self._name}.rows.npy", mmap_mode="r", allow_pickle=False)

    def tally(self) -> Tally:
        return Tally.from_json(read_json(self.folder / f"{self._name}.json", limit=2**28)["tally"])


def complete_parts(folder: Path) -> list[Part]:
    """The complete parts in ``folder``, from the first on without a gap."""
    parts: list[Part] = []
    while (path := folder / f"{len(parts):05}.json").exists():
        values = read_json(path, limit=2**28)
        part = Part(folder, len(parts), values["documents"], (values["end"][0], values["end"][1]))
        if len(part.rows()) != part.documents or part.lines.stat().st_size != values["bytes"]:
            raise UserError(f"{path} does not fit the files beside it: remove {folder.parent} and begin again")
        parts.append(part)
    return parts


def make_parts(recipe: Recipe, files: Files, folder: Path, processes: int, tick: Callable[[int, int], None]) -> None:
    """Write the parts that are missing. ``tick(documents, bytes)`` is called for each batch that is done."""
    parts = complete_parts(folder)
    start = parts[-1].end if parts else (0, 0)
    labels = [source.label for source in recipe.sources]
    if start == (len(files), 0):
        return
    try:
        writer = _Writer(folder, len(parts), recipe.near_duplicates)
        try:
            for batch, cleaned in _cleaned(recipe, files, _batches(files, labels, start), processes):
                writer.add(batch, cleaned)
                tick(len(cleaned.rows), batch.size)
                if writer.size >= PART:
                    file, number, _ = batch.records[-1]
                    writer.close((file, number + 1))
                    writer = _Writer(folder, writer.number + 1, recipe.near_duplicates)
            writer.close((len(files), 0))
        finally:
            writer.abandon()
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror or error}; a rerun continues") from error


# ---- reading ----


class _Log:
    """What readers say, for the batch that is being filled."""

    def __init__(self, label: str, name: str) -> None:
        self._label, self._name = label, name
        self.events: list[tuple[str, str, int]] = []

    def skipped(self, reason: str, n: int = 1) -> None:
        self.events.append(("", reason, n))

    def problem(self, where: str, message: str) -> None:
        self.events.append((where, message, 1))

    def into(self, tally: Tally) -> None:
        for where, message, n in self.events:
            if where:
                tally.problem(self._label, f"{self._name}, {where}", message)
            else:
                tally.source(self._label).skipped[message] += n
        self.events.clear()


def _batches(files: Files, labels: list[str], start: tuple[int, int]) -> Iterator[Batch]:
    """The records from ``start`` (file and record) on."""
    batch = Batch()
    for n in range(start[0], len(files)):
        index, source = files[n]
        log = _Log(labels[index], source.name)
        first = start[1] if n == start[0] else 0
        try:
            for number, record in enumerate(source.records(log)):
                if number < first:  # the part before has it, and what was said of it
                    log.events.clear()
                    continue
                log.into(batch.tally)
                batch.records.append((n, number, record))
                batch.size += _size(record)
                if batch.size >= BATCH or len(batch.records) >= BATCH_RECORDS:
                    yield batch
                    batch = Batch()
        except Exception as error:  # of a library, on damage that the reader does not know: go on with the next file
            log.problem("while reading", one_line(error) or type(error).__name__)
        log.into(batch.tally)
    yield batch


def _size(record: Any) -> int:
    """Bytes or characters in a record, about."""
    if isinstance(record, (str, bytes)):
        return len(record)
    if isinstance(record, dict):
        record = tuple(record.values())
    elif not isinstance(record, (tuple, list)):
        record = tuple(vars(record).values()) if hasattr(record, "__dict__") else ()
    return 64 + sum(map(_size, record))


# ---- cleaning ----

_worker: Worker


def _begin(recipe: Recipe, files: Files) -> None:
    """In a worker process."""
    global _worker
    end_with_parent()
    _worker = Worker(recipe, files)


def _clean(batch: Batch) -> Cleaned:
    return _worker.clean(batch)


def _cleaned(recipe: Recipe, files: Files, batches: Iterator[Batch], processes: int) -> Iterator[tuple[Batch, Cleaned]]:
    """Each batch and what is left of it, in order."""
    worker = Worker(recipe, files)  # what can't work is said here, once
    if processes == 1:
        for batch in batches:
            yield batch, worker.clean(batch)
        return
    del worker
    pool = _Pool(recipe, files, processes)
    waiting: deque[tuple[Batch, Future[Cleaned]]] = deque()
    with pool.running():
        for batch in batches:
            waiting.append((batch, pool.submit(batch)))
            while len(waiting) > AHEAD * processes:
                yield pool.result(waiting)
        while waiting:
            yield pool.result(waiting)


class _Pool:
    """Worker processes. One that a record kills (a crash in a parser's C code, no memory) costs that record only."""

    def __init__(self, recipe: Recipe, files: Files, processes: int) -> None:
        self._arguments, self._processes, self._files = (recipe, files), processes, files
        self._labels = [source.label for source in recipe.sources]
        self._pool = self._new(processes)

    def _new(self, processes: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, context, initializer=_begin, initargs=self._arguments)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, batch: Batch) -> Future[Cleaned]:
        with starting():
            return self._pool.submit(_clean, batch)

    def result(self, waiting: deque[tuple[Batch, Future[Cleaned]]]) -> tuple[Batch, Cleaned]:
        """Of the first batch that is waiting."""
        batch, future = waiting.popleft()
        try:
            return batch, future.result()
        except BrokenProcessPool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._new(1)  # so that it is known which batch kills
        cleaned = self._one_by_one(batch)
        self._pool.shutdown()
        self._pool = self._new(self._processes)
        for n, (later, _) in enumerate(waiting):
            waiting[n] = later, self.submit(later)
        return batch, cleaned

    def _one_by_one(self, batch: Batch) -> Cleaned:
        """Halve the batch until the records that kill a worker are alone."""
        try:
            return self.submit(batch).result()
        except BrokenProcessPool:
            self._pool = self._new(1)
        if len(batch.records) == 1:
            file, number, _ = batch.records[0]
            index, source = self._files[file]
            where = f"{source.name}, record {number:,}"
            batch.tally.problem(self._labels[index], where, "it killed the process that read it")
            return self._one_by_one(Batch([], batch.tally))
        if not batch.records:
            raise UserError(
                "worker processes can't start: is there memory for them? A script must make its calls behind "
                'if __name__ == "__main__". --processes 1 needs no other process'
            )
        middle = len(batch.records) // 2
        halves = Batch(batch.records[:middle], batch.tally), Batch(batch.records[middle:])
        first, second = map(self._one_by_one, halves)
        first.tally.add(second.tally)
        return Cleaned(
            first.lines + second.lines,
            np.concatenate((first.rows, second.rows)),
            first.signatures + second.signatures,
            first.tally,
        )


# ---- writing ----


class _Writer:
    """Writes one part."""

    def __init__(self, folder: Path, number: int, minhash: MinHashSettings) -> None:
        self.folder, self.number, self._minhash = folder, number, minhash
        self.size = self.documents = 0
        self.tally = Tally()
        self._rows: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._file = open(self._path("jsonl.zst.part"), "wb")  # noqa: SIM115, closed by close or abandon

    def add(self, batch: Batch, cleaned: Cleaned) -> None:
        self._file.write(cleaned.lines)
        self._rows.append(cleaned.rows)
        self._signatures += cleaned.signatures
        self.tally.add(cleaned.tally)
        self.size += batch.size
        self.documents += len(cleaned.rows)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.number:05}.{suffix}"

    def close(self, end: tuple[int, int]) -> None:
        """Complete the part; the next one begins at ``end``."""
        self._file.close()
        with open(self._path("rows.npy"), "wb") as file:
            np.save(file, np.concatenate([np.empty(0, ROW), *self._rows]), allow_pickle=False)
        if self._minhash.enabled:
            write_signatures(self._path("signatures"), self._minhash, self._signatures)
        lines = self._path("jsonl.zst")
        self._path("jsonl.zst.part").replace(lines)
        values = {"documents": self.documents, "bytes": lines.stat().st_size, "end": end, "tally": self.tally.to_json()}
        write_atomic(self._path("json"), json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))

    def abandon(self) -> None:
        self._file.close()
        self._path("jsonl.zst.part").unlink(missing_ok=True)
