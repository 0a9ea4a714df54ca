"""Text files and folders."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .documents import documents
from .folders import LeftOut, kind_of_file, model_files, printable, text_files

TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))  # of the standard library
BLOCK = 2**20  # bytes that are read at a time
DOCUMENT = 2**14  # characters of a document, at most


@dataclass(frozen=True)
class TextFile:
    """The documents that a file was cut into, and what the user named that it is from."""

    texts: list[str]
    source: str

    @property
    def digest(self) -> str:
        """A hash of its text."""
        digest = hashlib.blake2b(digest_size=16)
        for text in self.texts:
            digest.update(text.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Files, and notes for the user about what was left out."""

    files: list[TextFile]
    name: str
    notes: tuple[str, ...] = ()

    @property
    def documents(self) -> list[str]:
        return [text for file in self.files for text in file.texts]

    @property
    def size(self) -> int:
        """Characters in total."""
        return sum(len(text) for file in self.files for text in file.texts)


class _NotText(Exception):
    """Why a file can't be read as text."""


def load_corpus(paths: Iterable[str | Path], document: int = DOCUMENT) -> Corpus:
    """Read text files, and the text files in folders; without paths the source of Python's standard library.

    A file is cut into documents of at most ``document`` characters. Files of the same content count once.

    Args:
        paths: files and folders. Hidden folders, caches, and run and model folders in a folder are left out.
        document: see :func:`documents`.

    Raises:
        UserError: a named file can't be read or has no text, or a named folder holds a model.
    """
    named = list(paths)
    reader = _Reader(document)
    if named:
        name = ", ".join(map(printable, named[:3])) + (", …" if len(named) > 3 else "")
        read = [TextFile(texts, printable(path)) for path in named for texts in reader.named(path)]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        name = f"Python's standard library ({printable(root)})"
        files = (p for p in text_files(root, LeftOut()) if p.suffix == ".py")
        used = (p for p in files if not TEST_FOLDERS & set(p.relative_to(root).parts))
        read = [TextFile(texts, "Python's standard library") for texts in reader.all(used)]
    left_out = str(reader.left_out)
    if not read:
        raise UserError(f"there is no text in {name}" + (f"; left out: {left_out}" if left_out else ""))
    return Corpus(read, name, (f"left out: {left_out}",) if left_out else ())


class _Reader:
    """Reads files, each once, and cuts them into documents."""

    def __init__(self, document: int) -> None:
        self._document = document
        self._seen: set[object] = set()  # files by device and number, and by content
        self.left_out = LeftOut()

    def named(self, path: str | Path) -> list[list[str]]:
        """The documents of the file, or of each file in the folder, that the user named."""
        if not str(path):
            raise UserError("the name of a data file is empty")
        path = Path(path)
        try:
            if not os.path.isdir(path):
                return list(filter(None, [self._read(path)]))
            found = model_files(os.listdir(path))
        except _NotText as error:
            raise UserError(f"the data file {printable(path)} {error}") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"can't read the data {'folder' if os.path.isdir(path) else 'file'} {printable(path)}: {reason}"
            ) from None
        except MemoryError:
            raise UserError(f"the data file {printable(path)} does not fit in memory") from None
        if found:
            raise UserError(
                f"{printable(path)} is a run or model folder, not text to train on: it has {', '.join(found[:3])}"
            )
        files = list(text_files(path, self.left_out))
        if not files:
            left_out = str(self.left_out)
            raise UserError(
                f"the folder {printable(path)} has no text files (of the suffixes .txt, .md, .py, .c and the like)"
                + (f"; left out: {left_out}" if left_out else "")
            )
        return self.all(files)

    def all(self, files: Iterable[Path]) -> list[list[str]]:
        """The documents of each file in a folder: those that can't be read are left out."""
        read: list[list[str]] = []
        for file in files:
            try:
                if texts := self._read(file):
                    read.append(texts)
            except _NotText as error:
                if str(error) != "is empty":
                    self.left_out.add(str(error).partition(":")[0].removeprefix("is "), file)
            except OSError:
                self.left_out.add("files that can't be read", file)
        return read

    def _read(self, path: Path) -> list[str]:
        """The documents of a file; none where a file of the same content was read before."""
        with _open(path) as file:
            status = os.fstat(file.fileno())
            if (identity := (status.st_dev, status.st_ino)) in self._seen:
                return []
            digest = hashlib.blake2b(digest_size=16)
            texts = list(documents(_decoded(file, digest), self._document))
            if not any(map(str.strip, texts)):
                raise _NotText("is empty")
        again = digest.digest() in self._seen
        self._seen |= {identity, digest.digest()}
        return [] if again else texts


def _open(path: Path) -> BinaryIO:
    """Open a regular file. No other kind is even opened: that can wait forever, and devices may act on it."""
    if kind := kind_of_file(path.stat().st_mode):
        raise _NotText(f"is a {kind}")
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # /proc/kmsg waits, too
    return open(number, "rb")


def _decoded(file: BinaryIO, digest: hashlib.blake2b) -> Iterator[str]:
    """The text of a UTF-8 file in parts, without a byte order mark at its begin; ``digest`` takes in its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin = True
    while True:
        block = file.read(BLOCK) or b""
        if begin:
            _check_encoding(block)
            block = block.removeprefix(codecs.BOM_UTF8)
            begin = False
        start = file.tell() - len(block) - len(decoder.getstate()[0])
        digest.update(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _NotText(f"is not UTF-8 text: byte {start + error.start} ({error.reason})") from None
        if not block:
            return


def _check_encoding(block: bytes) -> None:
    """Raise for UTF-16 and UTF-32, and for what is no text by its NULs."""
    for name, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),
        ("UTF-32", codecs.BOM_UTF32_BE),
        ("UTF-16", codecs.BOM_UTF16_LE),
        ("UTF-16", codecs.BOM_UTF16_BE),
    ):
        if block.startswith(mark) and len(block) % len(mark) == 0:
            raise _NotText(f"is {name} text: convert it to UTF-8, as iconv -f {name} -t UTF-8 does")
    even, odd = (block[i:4096:2].count(0) / max(len(block[i:4096:2]), 1) for i in (0, 1))
    if len(block) >= 4 and even + odd > 0.7:
        if min(even, odd) < 0.1:
            name = "UTF-16LE" if odd > even else "UTF-16BE"
            raise _NotText(f"is {name} text: convert it to UTF-8, as iconv -f {name} -t UTF-8 does")
        raise _NotText("is not text: it has more zero bytes than text can have")
