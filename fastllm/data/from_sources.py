"""From whatever ``fastllm train --data`` names to the run's tokens: the steps before training, in its folder."""

from __future__ import annotations

import os
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .. import console
from ..errors import UserError
from .corpus.shards import is_corpus, read_corpus
from .document import Document
from .folders import LeftOut, printable, refuse_own, text_files
from .progress import progress
from .readers import ReaderOptions, Seen, Source, open_source
from .readers.text import TextSource
from .token_shards import document_key, write_tokens
from .tokenizer import Tokenizer

TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))  # of the standard library
STANDARD_LIBRARY = "Python's standard library"

Files = Sequence[tuple[str, Source]]  # each with what the user named that it is from


def make_tokens(paths: Sequence[str], vocab_size: int, document: int, folder: Path) -> Path:
    """Make a folder of tokens, ``folder / "tokens"``, and return it.

    Text and code are read twice, once for the tokenizer and once to encode them. Of crawls, dumps, books and tables a
    corpus is made first, ``folder / "corpus"``, by the recipe that ``fastllm data prepare`` has by default.

    Args:
        paths: a corpus, or sources as :func:`fastllm.data.readers.open_source` takes them; none: the source of Python's
            standard library.
        vocab_size: tokens of the tokenizer that is trained.
        document: a text file is cut into documents of at most this many characters.
        folder: of the run.

    Raises:
        UserError: a source can't be read, or there is no text.
    """
    if any(os.path.isdir(path) and is_corpus(path) for path in paths):
        if len(paths) > 1:
            raise UserError(f"{printable(paths[0])} is a corpus, or one beside it is: give one corpus alone")
        return _from_corpus(Path(paths[0]), vocab_size, folder)
    for path in paths:
        refuse_own(path)
    options = ReaderOptions(document=document)
    seen = Seen()
    files = _files(paths, options, seen) if paths else _standard_library(options, seen)
    if left_out := str(seen.left_out):
        console.say("", f"left out: {left_out}")
    if not files:
        raise UserError(f"there is no text in {', '.join(map(printable, paths))}")
    if all(isinstance(source, TextSource) for _, source in files):
        return _from_text(files, vocab_size, folder)

    from .corpus.prepare import prepare
    from .corpus.recipe import Recipe, SourceSpec

    corpus = folder / "corpus"
    outcome = prepare(Recipe(tuple(map(SourceSpec, dict.fromkeys(paths))), options), corpus)
    if outcome.problems:
        console.say("damaged", f"{outcome.problems:,} places in the sources: {corpus / 'report.md'} lists them")
    if not outcome.report["documents"]:
        raise UserError(f"the filters keep no document of {', '.join(map(printable, paths))}")
    return _from_corpus(corpus, vocab_size, folder)


def _files(paths: Sequence[str], options: ReaderOptions, seen: Seen) -> Files:
    return [(printable(path), source) for path in paths for source in open_source(path, options, seen)]


def _standard_library(options: ReaderOptions, seen: Seen) -> Files:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        (STANDARD_LIBRARY, TextSource(str(path), str(path), options, "code"))
        for path in text_files(root, LeftOut())
        if path.suffix == ".py" and not TEST_FOLDERS & set(path.relative_to(root).parts) and not seen.again(str(path))
    ]


def _from_corpus(corpus: Path, vocab_size: int, folder: Path) -> Path:
    from .tokenize import tokenize

    tokenizer = Tokenizer.train((document["text"] for document in read_corpus(corpus)), vocab_size)
    tokenize(corpus, tokenizer, folder / "tokens")
    return folder / "tokens"


def _from_text(files: Files, vocab_size: int, folder: Path) -> Path:
    size = sum(os.path.getsize(source.name) for _, source in files if os.path.exists(source.name))
    count = [0, 0]

    def texts() -> Iterator[str]:
        for _, document in _documents(files, warn=True):
            count[0] += 1
            count[1] += len(document.text)
            yield document.text

    tokenizer = Tokenizer.train(texts(), vocab_size, characters=size)
    if not count[0]:
        raise UserError(f"there is no text in {', '.join(dict.fromkeys(name for name, _ in files))}")
    names = list(dict.fromkeys(name for name, _ in files))
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    console.say("data", f"{shown}: {count[0]:,} documents, {count[1] / 1e6:.1f}M characters")
    out = folder / "tokens"
    waiting: deque[tuple[str, int, int]] = deque()  # source, key and characters of documents that are being encoded

    def read() -> Iterator[str]:
        for name, document in _documents(files):
            key = document_key(document.text, document.metadata.get("group"))
            waiting.append((name, key, len(document.text)))
            yield document.text

    with write_tokens(out, tokenizer) as writer, progress("encoding", count[1]) as bar:
        for ids in tokenizer.encode_batch(read()):
            name, key, characters = waiting.popleft()
            writer.add(ids, name, key)
            bar.advance(characters)
    return out


def _documents(files: Iterable[tuple[str, Source]], warn: bool = False) -> Iterator[tuple[str, Document]]:
    for name, source in files:
        for record in source.records(_Warnings(source.name, warn)):
            yield name, source.extract(record)


class _Warnings:
    """A reader's log that says what is damaged."""

    def __init__(self, name: str, warn: bool) -> None:
        self._name, self._warn = printable(name), warn

    def skipped(self, reason: str, n: int = 1) -> None:
        pass

    def problem(self, where: str, message: str) -> None:
        if self._warn:
            console.say("damaged", f"{self._name}, {where}: {message}")
