"""What a run trains on: the documents of one or more folders of tokens, and which of them are for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .token_shards import INDEX, TokenFolder
from .tokenizer import Tokenizer


class Documents(NamedTuple):
    """Documents by where they start in the row of all tokens, int64, and by their length, uint32."""

    starts: np.ndarray
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def select(self, chosen: np.ndarray) -> Documents:
        return Documents(self.starts[chosen], self.lengths[chosen])


class TokenData:
    """The documents of folders of tokens as one row.

    Raises:
        UserError: a folder can't be read, or they have different tokenizers.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.folders = [TokenFolder(path) for path in paths]
        first = self.folders[0]
        for folder in self.folders:
            if (folder.fingerprint, folder.eos_id) != (first.fingerprint, first.eos_id):
                raise UserError(f"{folder.path} has another tokenizer than {first.path}: tokenize both with the same")
        self.vocab_size, self.eos_id = first.vocab_size, first.eos_id
        self.sources = list(dict.fromkeys(name for folder in self.folders for name in folder.sources))
        self._ends = np.cumsum([folder.tokens for folder in self.folders])

    @property
    def tokenizer(self) -> Tokenizer:
        return self.folders[0].tokenizer

    @property
    def weights(self) -> tuple[str, ...]:
        """NAME=WEIGHT of each source, where the recipes of the corpora give weights."""
        known: dict[str, float] = {}
        for folder in self.folders:
            known |= folder.weights
        return tuple(f"{name}={known.get(name, 0.0)}" for name in self.sources) if known else ()

    @property
    def checksum(self) -> str:
        """Stands for the whole content."""
        together = hashlib.sha256("".join(folder.checksum for folder in self.folders).encode()).hexdigest()
        return together if len(self.folders) > 1 else self.folders[0].checksum

    @property
    def documents(self) -> Documents:
        """All of them."""
        lengths = self._column("lengths")
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=starts[1:])
        return Documents(starts, lengths)

    @property
    def keys(self) -> np.ndarray:
        """The key of each document."""
        return self._column("keys")

    @property
    def source(self) -> np.ndarray:
        """The number of each document's source in :attr:`sources`."""
        if len(self.folders) == 1:
            return self.folders[0].source
        numbers = {name: number for number, name in enumerate(self.sources)}
        parts = (np.array([numbers[s] for s in folder.sources])[folder.source] for folder in self.folders)
        return np.concatenate([part.astype(np.uint32) for part in parts])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the row, which are of one document."""
        if len(self.folders) == 1:
            return self.folders[0].read(start, stop)
        number = int(np.searchsorted(self._ends, start, side="right"))
        first = int(self._ends[number]) - self.folders[number].tokens
        return self.folders[number].read(start - first, stop - first)

    def verify(self, part: int, parts: int) -> None:
        """Check every ``parts``-th shard from ``part`` on; UserError where one is damaged."""
        for folder in self.folders:
            folder.verify(part, parts)

    def forget_documents(self) -> None:
        """Free what the folders hold for each document: a split has its own."""
        for folder in self.folders:
            for name in ("lengths", "keys", "source", "starts"):
                vars(folder).pop(name, None)  # cached properties, which are made anew where they are asked for

    def _column(self, name: str) -> np.ndarray:
        parts = [getattr(folder, name) for folder in self.folders]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def is_token_folder(path: str | Path) -> bool:
    return Path(path, INDEX).is_file()


class Split(NamedTuple):
    """Documents of both splits; ``train_source``: the source of each for training."""

    train: Documents
    validation: Documents
    train_source: np.ndarray


def split(data: TokenData, share: float, least: int) -> Split:
    """Choose documents for validation, which stay the same when data is added.

    These are the documents whose key's high 32 bits, a hash of the file that they were cut from, are below ``share`` of
    their range: no file is in both splits. Data of few files can give too much that way: then files that are too long
    are left out. Or too little, less than half of ``share`` of all tokens or than ``least`` tokens: then documents are
    added, by their own hash; where these are too long, the end of the longest document.
    """
    documents, keys = data.documents, data.keys
    wanted = max(int(share * documents.tokens), least)
    chosen = (keys >> np.uint64(32)) < np.uint64(share * 2**32)
    found = int(documents.lengths[chosen].sum(dtype=np.int64))
    if found > 2 * wanted:
        found = _choose_files(documents.lengths, keys, chosen, wanted)
    if found < max(wanted / 2, least):
        found += _choose_more(documents.lengths, keys, chosen, wanted - found)
    train, validation = documents.select(~chosen), documents.select(chosen)
    missing = wanted - found
    if found < max(wanted / 2, least) and len(train.lengths) and train.lengths.max() > missing:
        longest = int(train.lengths.argmax())
        train.lengths[longest] -= missing
        end = train.starts[longest] + train.lengths[longest]
        validation = Documents(np.append(validation.starts, end), np.append(validation.lengths, np.uint32(missing)))
    return Split(train, validation, data.source[~chosen])


def _choose_files(lengths: np.ndarray, keys: np.ndarray, chosen: np.ndarray, room: int) -> int:
    """Leave in ``chosen`` the files, in the order of their hashes, that fit into ``room`` tokens; their tokens."""
    documents = np.flatnonzero(chosen)
    _, file = np.unique(keys[documents] >> np.uint64(32), return_inverse=True)
    kept = 0
    for number, size in enumerate(np.bincount(file, lengths[documents]).astype(np.int64).tolist()):
        if kept + size > room:
            chosen[documents[file == number]] = False
        else:
            kept += size
    return kept


def _choose_more(lengths: np.ndarray, keys: np.ndarray, chosen: np.ndarray, room: int) -> int:
    """Add documents that fit into ``room`` tokens to ``chosen``, by the low 32 bits of their keys; their tokens."""
    order = np.flatnonzero(~chosen)
    order = order[np.argsort(keys[order] & np.uint64(2**32 - 1), kind="stable")]
    added = 0
    while (order := order[lengths[order] <= room - added]).size:
        fits = int(np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), room - added, side="right"))
        chosen[order[:fits]] = True
        added += int(lengths[order[:fits]].sum(dtype=np.int64))
        order = order[fits:]
    return added
