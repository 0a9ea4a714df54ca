"""Contamination: items whose text was in the data of training, by the n-grams of the pipeline's filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..data.corpus.shards import is_corpus, read_corpus
from ..data.deduplication.decontamination import DecontaminationSettings, NgramTable
from ..data.deduplication.evaluation_files import strings_of
from ..data.deduplication.words import Hashes, Words, ngram_hashes
from ..data.progress import progress
from ..data.readers import ReaderOptions, Seen, open_source
from ..data.readers.base import Skipped
from ..data.token_data import TokenData, is_token_folder
from ..errors import UserError
from ..run_dir import TOKENS
from . import statistics
from .items import Prepared
from .run import Sample


def contaminated(
    prepared: Sequence[Prepared], samples: Mapping[str, Sequence[Sample]], paths: Sequence[Path]
) -> dict[str, dict[str, Any]]:
    """By task, the items that share a run of 13 words (Brown et al. 2020, appendix C) with the data.

    An item's texts are the strings of its row. One of fewer than 13 words, but of at least 8, is looked for as a whole;
    a shorter one is not (``too_short`` counts the items that have no other).

    Args:
        prepared: the items.
        samples: the answers to them, by task.
        paths: folders of tokens, runs, corpora, and files in any form that ``fastllm data prepare`` reads.

    Returns:
        By task: ``items`` that were found, their ``numbers``, and the metrics of the ``clean`` and of the
        ``contaminated`` ones.

    Raises:
        UserError: a path has no text.
    """
    settings = DecontaminationSettings()
    places: dict[int, list[tuple[int, Hashes]]] = {}  # by length of the n-grams: items and their hashes
    items = [item for part in prepared for item in part.items]
    for number, item in enumerate(items):
        for text in strings_of(item.row.values):
            hashes = Words(text).hashes()
            length = min(len(hashes), settings.ngram)
            if length >= settings.shortest:
                places.setdefault(length, []).append((number, ngram_hashes(hashes, length)))
    tables = {length: NgramTable(np.unique(np.concatenate([h for _, h in parts]))) for length, parts in places.items()}
    seen = {length: np.zeros(len(table.hashes), np.bool_) for length, table in tables.items()}
    documents = 0
    with progress("contamination", 0) as bar:
        for text in _texts(paths):
            documents += 1
            hashes = Words(text).hashes()
            for length, table in tables.items():
                if len(hashes) >= length:
                    seen[length][table.find(ngram_hashes(hashes, length))[1]] = True
            bar.advance(1)
    if not documents:
        raise UserError(f"--contamination: there is no text in {', '.join(map(str, paths))}")
    found = {
        number
        for length, parts in places.items()
        for number, hashes in parts
        if seen[length][np.searchsorted(tables[length].hashes, hashes)].any()
    }
    looked_for = {number for parts in places.values() for number, _ in parts}
    results, first = {}, 0
    for part in prepared:
        numbers = range(first, first + len(part.items))
        first += len(part.items)
        results[part.task.name] = _result(
            part, samples[part.task.name], [n in found for n in numbers], paths, settings.ngram, documents
        ) | {"too_short": sum(n not in looked_for for n in numbers)}
    return results


def _result(
    part: Prepared, samples: Sequence[Sample], found: list[bool], paths: Sequence[Path], ngram: int, documents: int
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "items": sum(found), "ngram": ngram, "data": ", ".join(map(str, paths)), "documents": documents,
        "numbers": [[item.group, item.number] for item, hit in zip(part.items, found, strict=True) if hit],
    }  # fmt: skip
    for name, wanted in (("clean", False), ("contaminated", True)):
        chosen = [sample for sample, hit in zip(samples, found, strict=True) if hit == wanted]
        if chosen:
            result[name] = {"n": len(chosen)}
            for metric in part.task.metrics:
                result[name] |= statistics.rates(metric, [[sample.metrics[metric] for sample in chosen]])
    return result


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    """Of tokens, of a run's tokens, of a corpus, and of files as ``fastllm data prepare`` reads them."""
    for path in paths:
        if is_token_folder(path / TOKENS):
            yield from _decoded(path / TOKENS)
        elif is_token_folder(path):
            yield from _decoded(path)
        elif path.is_dir() and is_corpus(path):
            for document in read_corpus(path):
                yield document["text"]
        else:
            for source in open_source(str(path), ReaderOptions(), Seen()):
                for record in source.records(_NoLog()):
                    with suppress(Skipped):  # what the pipeline leaves out too
                        yield source.extract(record).text


def _decoded(folder: Path) -> Iterator[str]:
    data = TokenData([folder])
    for start, length in zip(*data.documents, strict=True):
        yield data.tokenizer.decode(data.read(int(start), int(start + length)).tolist())


class _NoLog:
    """Of a reader: what is damaged was said when the training data was made."""

    def skipped(self, reason: str, n: int = 1) -> None:
        pass

    def problem(self, where: str, message: str) -> None:
        pass
