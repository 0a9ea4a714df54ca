"""Near duplicates by MinHash-LSH in four stages.

    1. write_signatures   for each part of the documents: a signature for each
    2. write_buckets      for each band: which documents agree in it
    3. write_clusters     for each document: the kept one that it repeats
    4. kept_documents     for each part: the documents that stay

Each stage reads files and writes one, so that each call can be a task of its own (``write_signatures`` and
``write_buckets`` in parallel). ``near_duplicates`` does stages 2 and 3 on one machine.

Documents are numbered in the order of the parts. In this order each document is dropped where it resembles, by its
whole signature, a document that is kept; else it is kept. So the first of several is kept, no document is dropped for
one that is itself dropped (A resembles B, B resembles C, C doesn't resemble A: only B goes), and documents that come
later change nothing for those before.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .arrays import Rows, Stored, equal_runs, write_array
from .minhash import EMPTY, MinHashSettings, Signature
from .words import mix

T = TypeVar("T")

NEIGHBORS = 32  # kept documents of a bucket, the last ones, that a document is compared with: bounds a bucket's cost
CHUNK = 1 << 14  # documents whose signatures are in memory at once

KIND = "MinHash signatures"
BUCKETS = "MinHash buckets"
CLUSTERS = "duplicates"


def write_signatures(path: str | Path, settings: MinHashSettings, signatures: Iterable[Signature]) -> int:
    """Stage 1: write the signatures of a part of the documents, one or several at once, and return their number."""
    return write_array(path, KIND, settings.about(), "<u4", settings.permutations, signatures)


class Signatures:
    """The signatures of all documents, from the files of write_signatures in their order.

    Attributes:
        settings: what they were made with.
        rows: uint32 ``[documents, bands * rows]``.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise UserError("no files of MinHash signatures")
        self._files = [Stored(path, KIND) for path in paths]
        about = dict(self._files[0].about)
        for file in self._files:
            if file.about != about:
                raise UserError(f"{file.path} and {self._files[0].path} were made with different MinHash settings")
        if (algorithm := about.pop("algorithm", None)) != MinHashSettings().about()["algorithm"]:
            raise UserError(f"{self._files[0].path} was made by another version: {algorithm!r}; delete it")
        try:
            self.settings = MinHashSettings(**about)
        except TypeError:
            raise UserError(f"{self._files[0].path} was made with other MinHash settings; delete it") from None
        self.rows = Rows([file.rows for file in self._files])

    def __len__(self) -> int:
        return len(self.rows)

    def similarity(self, first: int, second: int) -> float:
        """The Jaccard similarity of two documents, as their signatures estimate it."""
        a, b = self.rows.take([first, second])
        return float(np.mean(a == b))

    def release(self) -> None:
        """See Stored."""
        for file in self._files:
            file.release()


def write_buckets(signatures: Signatures, band: int, path: str | Path) -> int:
    """Stage 2: write which documents agree in a band, and return their number.

    A row of the file is ``document << 32 | bucket``; the rows are sorted. Documents that agree with no other, and those
    without words, have none. This takes up to 24 bytes of memory for each document.

    Args:
        band: 0 to ``bands - 1``, or ``bands`` for the whole signature.
    """
    settings, count = signatures.settings, len(signatures)
    if count >= 1 << 32:
        raise UserError(f"near duplicates can be found among 4,294,967,295 documents, here are {count:,}")
    columns = slice(band * settings.rows, (band + 1) * settings.rows) if band < settings.bands else slice(None)
    bits = max(1, (count - 1).bit_length())  # the rest of 64 is the hash: what collides in it, the clusters tell apart
    keys = np.empty(count, np.uint64)
    used = 0
    for start, block in signatures.rows.blocks(CHUNK):
        values = np.ascontiguousarray(block[:, columns].T)
        hashes = np.zeros(len(block), np.uint64)
        for value in values:
            hashes += value
            mix(hashes)
        hashes >>= np.uint64(bits)
        hashes <<= np.uint64(bits)
        hashes |= np.arange(start, start + len(block), dtype=np.uint64)
        hashes = hashes[(values != EMPTY).any(0)]
        keys[used : used + len(hashes)] = hashes
        used += len(hashes)
        signatures.release()
    documents, buckets = equal_runs(keys[:used], bits)
    del keys
    total = int(buckets[-1]) + 1 if len(buckets) else 0
    documents <<= np.uint64(32)
    documents |= buckets.view(np.uint64)
    del buckets
    documents.sort()
    about = {"band": band, "documents": count, "buckets": total, "minhash": settings.about()}
    return write_array(path, BUCKETS, about, "<u8", 1, [documents])


def write_clusters(signatures: Signatures, bucket_paths: Sequence[str | Path], path: str | Path) -> int:
    """Stage 3: write for each document the number of the kept one that it repeats, or -1; return how many repeat one.

    A document is compared with the kept ones that agree with it in a band: in each of its buckets with the last 32 of
    them. Where several reach the threshold it is the most similar that it repeats, and of those the first. Documents of
    one signature share their fate, and cost no comparison. So the time grows with the number of documents, not of
    pairs, whatever the texts are. Beside files this takes 8 bytes of memory for each document.

    Args:
        bucket_paths: one file for each band and one for the whole signature, in any order.
    """
    buckets = _open_buckets(signatures, bucket_paths)
    result = np.full(len(signatures), -1, np.int64)
    with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".clusters-") as scratch:
        _Clusters(signatures, buckets, Path(scratch)).find(result)
    write_array(path, CLUSTERS, {}, "<i8", 1, [result])
    return int(np.count_nonzero(result >= 0))


def read_clusters(path: str | Path) -> NDArray[np.int64]:
    """What write_clusters wrote: int64 ``[documents]``, memory-mapped."""
    return Stored(path, CLUSTERS).rows[:, 0]


def kept_documents(documents: Iterable[T], clusters: NDArray[np.int64], first: int = 0) -> Iterator[T]:
    """Stage 4: those of a part's documents that repeat none. ``first``: the number of the part's first document."""
    number = first
    for document in documents:
        if number >= len(clusters):
            raise UserError(f"there are more documents than signatures: {len(clusters):,}; run deduplication again")
        if clusters[number] < 0:
            yield document
        number += 1


def near_duplicates(
    signature_paths: Sequence[str | Path], scratch: str | Path | None = None
) -> tuple[NDArray[np.int64], Signatures]:
    """Stages 2 and 3 on one machine, a band at a time.

    Args:
        signature_paths: the files of write_signatures, in the order of the documents.
        scratch: a folder for temporary files, of up to 600 bytes for each document that agrees with another in all
            bands; the system's where none is given.

    Returns:
        int64 ``[documents]``: the number of the kept document that each repeats, or -1; and the opened signatures,
        which give the similarity of samples.
    """
    signatures = Signatures(signature_paths)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".duplicates-") as folder:
        paths = [Path(folder, f"{band:04}") for band in range(signatures.settings.bands + 1)]
        for band, path in enumerate(paths):
            write_buckets(signatures, band, path)
        write_clusters(signatures, paths, Path(folder, "clusters"))
        return np.array(read_clusters(Path(folder, "clusters"))), signatures


def _open_buckets(signatures: Signatures, paths: Sequence[str | Path]) -> list[Stored]:
    """The files of buckets by band."""
    made_with, bands = signatures.settings.about(), signatures.settings.bands
    found: dict[int, Stored] = {}
    for path in paths:
        file = Stored(path, BUCKETS)
        if file.about.get("minhash") != made_with or file.about.get("documents") != len(signatures):
            raise UserError(f"{path} was made from other signatures; delete it, and the next run writes it again")
        band = file.about["band"]
        if band in found:
            raise UserError(f"{path} and {found[band].path} are of the same band")
        found[band] = file
    if missing := sorted(set(range(bands + 1)) - set(found)):
        raise UserError(f"no file of buckets for band {', '.join(map(str, missing))} of 0 to {bands}")
    return [found[band] for band in range(bands + 1)]


class _Clusters:
    """The state of write_clusters, in files where it grows with the number of agreements.

    The kept documents of a bucket are a list: ``heads[bucket]`` is its newest entry, ``previous[entry]`` the one before
    it, ``kept[entry]`` the document; entry 0 ends a list.
    """

    def __init__(self, signatures: Signatures, buckets: list[Stored], scratch: Path) -> None:
        self.signatures, self.buckets = signatures, buckets
        counts = [file.about["buckets"] for file in buckets]
        self.offsets = np.cumsum([0, *counts[:-1]])  # buckets are numbered through over the bands
        entries = 1 + sum(len(file.rows) for file in buckets[:-1])
        self.heads = _Scratch(scratch / "heads", sum(counts[:-1]))
        self.previous = _Scratch(scratch / "previous", entries)
        self.kept = _Scratch(scratch / "kept", entries)
        self.leaders = _Scratch(scratch / "leaders", counts[-1])  # the first document of each signature, + 1
        self.next_entry = 1
        self.positions = [0] * len(buckets)

    def find(self, result: NDArray[np.int64]) -> None:
        for start in range(0, len(result), CHUNK):
            stop = min(start + CHUNK, len(result))
            documents, buckets = self._chunk(len(self.buckets) - 1, stop)
            repeats, leaders = self._repeats(documents, buckets)
            self._decide(start, stop, repeats, result)
            result[repeats] = np.where(result[leaders] < 0, leaders, result[leaders])
            self.signatures.release()
            for array in (self.heads, self.previous, self.kept, self.leaders):
                array.release()

    def _chunk(self, band: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The next documents of a band, up to number ``stop``, and their buckets."""
        rows = self.buckets[band].rows[:, 0]
        begin = self.positions[band]
        window = rows[begin : begin + CHUNK]  # a document has one bucket in a band, at most
        end = begin + int(np.searchsorted(window, np.uint64(stop << 32)))
        self.positions[band] = end
        found = rows[begin:end]
        documents, buckets = (found >> np.uint64(32)).astype(np.int64), (found & np.uint64(0xFFFFFFFF)).astype(np.int64)
        self.buckets[band].release()
        return documents, buckets + (self.offsets[band] if band < len(self.buckets) - 1 else 0)

    def _repeats(
        self, documents: NDArray[np.int64], buckets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents whose signature an earlier one has, and the first that has it."""
        first = self.leaders.values
        new = first[buckets] == 0
        first[buckets[new][::-1]] = documents[new][::-1] + 1  # of several the one assigned last, the first
        leaders = first[buckets] - 1
        same = leaders < documents
        documents, leaders = documents[same], leaders[same]
        equal = np.zeros(len(documents), np.bool_)
        for i in range(0, len(documents), 1024):
            here = slice(i, i + 1024)
            rows = self.signatures.rows
            equal[here] = (rows.take(documents[here]) == rows.take(leaders[here])).all(1)
        return documents[equal], leaders[equal]

    def _decide(self, start: int, stop: int, repeats: NDArray[np.int64], result: NDArray[np.int64]) -> None:
        """Decide on the chunk's documents, in order, but for ``repeats``."""
        chunks = [self._chunk(band, stop) for band in range(len(self.buckets) - 1)]
        documents = np.concatenate([documents for documents, _ in chunks])
        buckets = np.concatenate([buckets for _, buckets in chunks])
        decided = np.zeros(stop - start, np.bool_)
        decided[repeats - start] = True
        open_ = ~decided[documents - start]
        documents, buckets = documents[open_], buckets[open_]
        order = np.argsort(documents, kind="stable")
        documents, buckets = documents[order], buckets[order]
        begins = np.flatnonzero(np.diff(documents, prepend=-1))
        ends = np.append(begins[1:], len(documents))[: len(begins)].tolist()
        numbers = buckets.tolist()
        heads, previous, kept = self.heads.view, self.previous.view, self.kept.view
        for document, begin, end in zip(documents[begins].tolist(), begins.tolist(), ends, strict=True):
            candidates = set()
            for bucket in numbers[begin:end]:
                entry, left = heads[bucket], NEIGHBORS
                while entry and left:
                    candidates.add(kept[entry])
                    entry, left = previous[entry], left - 1
            if candidates and (repeated := self._best(document, sorted(candidates))) >= 0:
                result[document] = repeated
                continue
            for bucket in numbers[begin:end]:
                kept[self.next_entry], previous[self.next_entry] = document, heads[bucket]
                heads[bucket] = self.next_entry
                self.next_entry += 1

    def _best(self, document: int, candidates: list[int]) -> int:
        """The candidate most similar to a document, or -1 where none reaches the threshold."""
        rows = self.signatures.rows.take([document, *candidates])
        equal = np.count_nonzero(rows[1:] == rows[0], axis=1)
        best = int(equal.argmax())
        return candidates[best] if equal[best] >= self.signatures.settings.least_equal else -1


class _Scratch:
    """Zeros, int64, in a file that is memory-mapped. ``view`` is for single values, ``values`` for many."""

    def __init__(self, path: Path, count: int) -> None:
        size = 8 * max(count, 1)
        try:
            with open(path, "w+b") as file:
                for i in range(0, size, 1 << 20):  # written, so that a full disk is an error now and no signal later
                    file.write(bytes(min(1 << 20, size - i)))
                file.flush()
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror or error}") from error
        self.view = memoryview(self._map).cast("q")
        self.values: NDArray[np.int64] = np.frombuffer(self._map, np.int64)

    def release(self) -> None:
        """See Stored."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
