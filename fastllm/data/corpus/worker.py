"""What a worker process does with a batch of records: documents from them, filters, keys and signatures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

from ...errors import UserError
from ...input_files import one_line
from ..cleaning import build
from ..deduplication import KEY_BYTES, Decontaminator, MinHash, exact_key
from ..document import Document
from ..readers import Skipped, Source
from ..readers.base import without_surrogates
from .recipe import Recipe
from .tally import Tally

LEVEL = 3  # of zstd

# What is kept of a document beside its text, until duplicates are found over all of them.
ROW = np.dtype(
    [
        ("key", "u1", KEY_BYTES),  # of its text, see exact_key
        ("characters", "<u4"),
        ("source", "<u2"),  # the number of the recipe's source
        ("language", "S8"),
        ("contaminated", "<u2"),  # by the evaluation file of this number, from 1; 0: not
    ]
)


@dataclass
class Batch:
    """Consecutive records of consecutive sources, and what the readers said meanwhile."""

    records: list[tuple[int, int, Any]] = field(default_factory=list)  # number of the file, of the record, the record
    tally: Tally = field(default_factory=Tally)
    size: int = 0  # bytes or characters


@dataclass
class Cleaned:
    """The documents of a batch that the filters keep."""

    lines: bytes  # JSON lines, a frame of zstd
    rows: np.ndarray  # ROW [documents]
    signatures: list[np.ndarray]  # uint32 [permutations] each; none where near duplicates are not looked for
    tally: Tally


class Worker:
    """Cleans batches as ``recipe`` says.

    Args:
        recipe: the settings.
        files: every file of the sources, in their order, and the number of the recipe's source that it belongs to.
    """

    def __init__(self, recipe: Recipe, files: Sequence[tuple[int, Source]]) -> None:
        self.recipe, self.files = recipe, files
        self.filter = build(recipe.filters)
        self.minhash = MinHash(recipe.near_duplicates) if recipe.near_duplicates.enabled else None
        self.decontaminator = Decontaminator(recipe.decontamination) if recipe.decontaminates else None
        self.compressor = zstandard.ZstdCompressor(LEVEL)

    def clean(self, batch: Batch) -> Cleaned:
        tally, lines = batch.tally, []
        rows: list[tuple[Any, ...]] = []
        signatures: list[np.ndarray] = []
        for file, number, record in batch.records:
            document = self._extract(tally, file, number, record)
            if document is None:
                continue
            tally.read(document)
            try:
                dropped = self.filter(document)
            except UserError:  # a package that is missing
                raise
            except Exception as error:  # of a filter: one document must not end the work
                where = f"{self.files[file][1].name}, record {number:,}"
                tally.problem(document.source, where, f"{type(error).__name__}: {one_line(error)}")
                tally.drop(document, "damaged", "a filter failed")
                continue
            if dropped:
                name, reason = dropped
                tally.drop(document, name, reason.removeprefix(f"{name}: "))
                continue
            tally.clean(document)
            rows.append(self._row(document, self.files[file][0]))
            if self.minhash is not None:
                signatures.append(self.minhash.signature(document.text))
            lines.append(json.dumps(document.to_json(), ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return Cleaned(
            self.compressor.compress(b"".join(line + b"\n" for line in lines)),
            np.array(rows, ROW),
            signatures,
            tally,
        )

    def _extract(self, tally: Tally, file: int, number: int, record: Any) -> Document | None:
        index, source = self.files[file]
        label = self.recipe.sources[index].label
        try:
            document = source.extract(record)
        except Skipped as skipped:
            if skipped.where:
                tally.problem(label, f"{source.name}, {skipped.where}", skipped.reason)
            else:
                tally.source(label).skipped[skipped.reason] += 1
            return None
        except Exception as error:  # of a parser: one document must not end the work
            tally.problem(label, f"{source.name}, record {number:,}", f"{type(error).__name__}: {one_line(error)}")
            return None
        document.text = without_surrogates(document.text)
        if document.source != label:
            document.metadata.setdefault("file", document.source)
            document.source = label
        return document

    def _row(self, document: Document, source: int) -> tuple[Any, ...]:
        key = np.frombuffer(exact_key(document.text), np.uint8)
        contaminated = 0
        if self.decontaminator is not None and self.decontaminator.contaminated(document):
            file = document.metadata["contamination"]["file"]
            contaminated = 1 + self.recipe.decontamination.files.index(file)
        language = str(document.metadata.get("language", "")).encode()[:8]
        return key, min(len(document.text), 2**32 - 1), source, language, contaminated
