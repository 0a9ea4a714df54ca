"""Text files and folders, and the validation split."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "txt text md rst tex org html xml csv tsv json jsonl toml yaml yml ini cfg css srt sql ipynb",
        "py pyi c h cc cpp cxx hpp cu cuh rs go java kt js jsx ts tsx rb php pl lua r jl hs ml scala swift sh",
    )
    for suffix in line.split()
)


TEST_FOLDERS = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


@dataclass(frozen=True)
class Corpus:
    """Documents of both splits, and notes for the user about what was skipped."""

    train: list[str]
    validation: list[str]
    name: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Characters in total."""
        return sum(map(len, self.train)) + sum(map(len, self.validation))


def load_corpus(paths: Iterable[str | Path], validation: float) -> Corpus:
    """Read text files, and the text files in folders; without paths the source of Python's standard library.

    ``validation``: the share of the validation split. Raises UserError where a named file can't be read or has no text.
    """
    named = [Path(p) for p in paths]
    notes: list[str] = []
    if named:
        name = ", ".join(map(str, named[:3])) + (", …" if len(named) > 3 else "")
        documents = [text for path in named for text in _read(path, notes)]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        name = f"Python's standard library ({root})"
        files = [p for p in sorted(root.rglob("*.py")) if not TEST_FOLDERS & set(p.relative_to(root).parts)]
        documents = _read_all(files, notes)
    if not any(map(str.strip, documents)):
        raise UserError(f"there is no text in {name}")
    return Corpus(*split(documents, validation), name, tuple(notes))


def _read(path: Path, notes: list[str]) -> list[str]:
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()]
        if not files:
            raise UserError(f"the folder {path} has no text files (of the suffixes .txt, .md, .py, .c and the like)")
        return _read_all(files, notes)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read the data file {path}: {error.strerror}") from None
    if not content.strip():
        raise UserError(f"the data file {path} is empty")
    try:
        return [content.decode()]
    except UnicodeDecodeError as error:
        raise UserError(f"the data file {path} is not UTF-8 text: byte {error.start} ({error.reason})") from None


def _read_all(files: list[Path], notes: list[str]) -> list[str]:
    """The texts of files in a folder: those that can't be read are skipped and noted."""
    texts, skipped = [], []
    for file in files:
        try:
            texts.append(file.read_bytes().decode())
        except (OSError, UnicodeDecodeError):
            skipped.append(file)
    if skipped:
        notes.append(f"skipped {len(skipped)} file(s) that are not UTF-8 text or can't be read, such as {skipped[0]}")
    return texts


def split(documents: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """``(train, validation)`` by the hash of each document: the same for any order and location of the files.

    Duplicates count once. Where whole documents make up less than half of ``share`` (one file, or a few of unequal
    size), the end of the longest document is added.
    """
    unique = {hashlib.blake2b(d.encode(), digest_size=16).digest(): d for d in documents if d}
    train, validation, room = [], [], share * sum(map(len, unique.values()))
    limit = room
    for _, document in sorted(unique.items()):
        if len(document) <= room:
            validation.append(document)
            room -= len(document)
        else:
            train.append(document)
    if room > limit / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        document = train[longest]
        cut = max(1, len(document) - max(1, round(room)))
        train[longest] = document[:cut]
        validation.append(document[cut:])
    return train, validation
