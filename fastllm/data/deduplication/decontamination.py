"""Decontamination: documents that hold text of evaluation files are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..document import Document
from .evaluation_files import evaluation_texts
from .settings import check_flag, check_integer
from .words import Hashes, Words, ngram_hashes

PENDING = 1 << 20  # hashes of a file that are collected before repeated ones are removed


@dataclass(frozen=True)
class DecontaminationSettings:
    """Drop documents that share word n-grams with evaluation files.

    The method is that of GPT-3 (Brown et al. 2020, appendix C): one common run of 13 words, without case and
    punctuation, is enough. GPT-3 cut the run and 200 characters around it out of the document; here the whole
    document is dropped. GPT-3 also passed over runs that more than 10 documents have;
    ``overlap`` serves against phrases that are common.

    Attributes:
        enabled: whether documents are compared with ``files``.
        files: evaluation files: JSONL, JSON, Parquet or Arrow, whose every string is a text, or plain text.
        ngram: words of a run. GPT-3 took 8 to 13, depending on the lengths of a benchmark's texts.
        shortest: an evaluation text of fewer than ``ngram`` words, but of at least these, is looked for as a whole. One
            of fewer words is passed over: "yes" or "the capital of France" would be found everywhere.
        overlap: different runs in common, at least, that drop a document. A short text found as a whole always does.
    """

    enabled: bool = True
    files: tuple[str, ...] = ()
    ngram: int = 13
    shortest: int = 8
    overlap: int = 1

    def __post_init__(self) -> None:
        check_flag("decontamination: enabled", self.enabled)
        if not isinstance(self.files, tuple) or not all(isinstance(file, str) for file in self.files):
            raise UserError("decontamination: files must be a list of names")
        check_integer("decontamination: ngram", self.ngram, 1, 100)
        check_integer("decontamination: shortest", self.shortest, 1, self.ngram)
        check_integer("decontamination: overlap", self.overlap, 1, 1_000_000)

    def build(self) -> Callable[[Document], str]:
        return Decontaminator(self).contaminated


class NgramTable:
    """The n-grams of one length that are looked for: different hashes, sorted, and a filter.

    The filter has 8 to 16 bytes for each n-gram, one of them set: it answers for almost all n-grams of a document.
    """

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        bits = (8 * len(hashes)).bit_length()
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, np.bool_)
        self.filter[hashes >> self.shift] = True

    def find(self, ngrams: Hashes) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which of the n-grams are there, and the places of these in :attr:`hashes`."""
        places = np.flatnonzero(self.filter.take((ngrams >> self.shift).view(np.int64)))
        rows = np.searchsorted(self.hashes, ngrams[places])
        rows[rows == len(self.hashes)] = 0
        same = self.hashes[rows] == ngrams[places]
        return places[same], rows[same]


class _Table(NgramTable):
    """Those of all files: 10 bytes each, with the first file of each, and the filter."""

    def __init__(self, parts: list[tuple[int, Hashes]]) -> None:
        files = np.concatenate([np.full(len(part), file, np.uint16) for file, part in parts])
        hashes, first = np.unique(np.concatenate([part for _, part in parts]), return_index=True)
        super().__init__(hashes)
        self.files = files[first]


class Decontaminator:
    """Finds the documents that hold text of evaluation files.

    Memory: about 22 bytes for each different n-gram of the files, which are read once. It can be pickled, so that other
    processes need not read them again.

    Attributes:
        short: by file, the number of texts that are too short to be looked for.
    """

    def __init__(self, settings: DecontaminationSettings) -> None:
        self.settings = settings
        self.short: dict[str, int] = {}
        if len(settings.files) >= 1 << 16:
            raise UserError(f"decontamination: {len(settings.files):,} files; at most 65,535")
        parts: dict[int, list[tuple[int, Hashes]]] = {}
        for number, file in enumerate(settings.files):
            found = self._read(file)
            if not found:
                raise UserError(f"evaluation file {file} holds no text of at least {settings.shortest} words")
            for length, hashes in found.items():
                parts.setdefault(length, []).append((number, hashes))
        self._tables = {length: _Table(parts[length]) for length in sorted(parts, reverse=True)}

    def __len__(self) -> int:
        """The number of different n-grams."""
        return sum(len(table.hashes) for table in self._tables.values())

    def contaminated(self, document: Document) -> str:
        """ "" or the reason to drop the document: the evaluation file whose text it holds.

        The metadata then has ``contamination``: that file, the number of different n-grams in common with all files
        (``ngrams``), and the ``text`` of the first.
        """
        settings = self.settings
        if not self._tables:
            return ""
        words = Words(document.text)
        hashes = words.hashes()
        for length, table in self._tables.items():
            ngrams = ngram_hashes(hashes, length)
            places, rows = table.find(ngrams)
            count = len(np.unique(ngrams[places]))
            if count >= (settings.overlap if length == settings.ngram else 1):
                file, first = settings.files[int(table.files[rows[0]])], int(places[0])
                text = words.text(first, first + length - 1)
                document.metadata["contamination"] = {"file": file, "ngrams": count, "text": text}
                return f"decontamination: text of {Path(file).name}"
        return ""

    def _read(self, file: str) -> dict[int, Hashes]:
        """The different n-grams of a file by their length."""
        found: dict[int, Hashes] = {}
        pending: dict[int, list[Hashes]] = {}
        waiting = 0
        self.short[file] = 0
        for length, hashes in self._ngrams(file):
            pending.setdefault(length, []).append(hashes)
            waiting += len(hashes)
            if waiting >= PENDING:
                _merge(found, pending)
                waiting = 0
        _merge(found, pending)
        return found

    def _ngrams(self, file: str) -> Iterator[tuple[int, Hashes]]:
        for text in evaluation_texts(file):
            words = Words(text).hashes()
            length = min(len(words), self.settings.ngram)
            if length >= self.settings.shortest:
                yield length, ngram_hashes(words, length)
            elif length:
                self.short[file] += 1


def _merge(found: dict[int, Hashes], pending: dict[int, list[Hashes]]) -> None:
    for length, parts in pending.items():
        found[length] = np.unique(np.concatenate([found.get(length, np.empty(0, np.uint64)), *parts]))
    pending.clear()
