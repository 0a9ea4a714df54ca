"""Encoded chats in one file of a run folder, and the sequences that are packed of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.loader import IGNORE_INDEX, Batch, Row, Sequences
from ..data.packing import BestFit
from ..data.token_data import Documents
from ..errors import UserError
from ..input_files import one_line
from ..model.weights import save_weights
from .rendering import Encoded


class Split(NamedTuple):
    """Numbers of rows, int64."""

    train: np.ndarray
    validation: np.ndarray


@dataclass
class Examples:
    """Encoded sequences, one after another, in rows of one or more: a chat, or the two answers of a pair.

    Attributes:
        tokens: int32 ``[tokens]``.
        trained: bool ``[tokens]``: whether each is learnt.
        starts: int64 ``[sequences + 1]``.
        source: int32 ``[rows]``: which file each row is of.
        for_validation: bool ``[rows]``.
        per_row: sequences of a row.
        extra: more tensors, by the row.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    source: np.ndarray
    for_validation: np.ndarray
    per_row: int = 1
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.starts)

    @property
    def split(self) -> Split:
        return Split(np.flatnonzero(~self.for_validation), np.flatnonzero(self.for_validation))

    @cached_property
    def checksum(self) -> str:
        """Stands for the whole content."""
        digest = hashlib.sha256()
        extra = (self.extra[name] for name in sorted(self.extra))
        for array in (self.tokens, self.trained, self.starts, self.source, self.for_validation, *extra):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a sequence, and which are learnt."""
        where = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[where], self.trained[where]

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in ("tokens", "trained", "starts", "source", "for_validation")}
        arrays |= {f"extra.{name}": array for name, array in self.extra.items()}
        save_weights(path, {n: torch.from_numpy(a) for n, a in arrays.items()}, {"per_row": str(self.per_row)})

    @classmethod
    def load(cls, path: Path, checksum: str) -> Examples:
        """Raises UserError where the file can't be read, or is not the one of this checksum."""
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                per_row = int((file.metadata() or {})["per_row"])
            extra = {n.removeprefix("extra."): arrays.pop(n) for n in list(arrays) if n.startswith("extra.")}
            found = cls(**arrays, per_row=per_row, extra=extra)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"can't read the examples {path}: {one_line(error)}") from None
        if found.checksum != checksum:
            raise UserError(f"the examples {path} are damaged: they are not what was written")
        return found


class ExamplesBuilder:
    """Collects rows of encoded sequences."""

    def __init__(self, per_row: int = 1) -> None:
        self.per_row = per_row
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._source: list[int] = []
        self._evaluated: list[bool] = []
        self._hashes: list[np.uint64] = []

    def __len__(self) -> int:
        return len(self._source)

    def add(self, row: Sequence[Encoded], source: int, *, evaluated: bool = False, of: Sequence[Encoded] = ()) -> None:
        """``of``: all sequences of a chat, where the row is one of them."""
        digest = hashlib.blake2b(digest_size=8)
        for encoded in row:
            self._ids.append(encoded.ids)
            self._trained.append(encoded.trained)
        for encoded in of or row:
            digest.update(encoded.ids.tobytes())
        self._source.append(source)
        self._evaluated.append(evaluated)
        self._hashes.append(np.frombuffer(digest.digest(), np.uint64)[0])

    def build(self, validation: float) -> Examples:
        """All rows. Where none was added for validation, about that share of them is, by the hashes of their tokens:
        rows that say the same, or are of one chat, are on the same side."""
        evaluated = np.array(self._evaluated, bool)
        names, number, sizes = np.unique(self._hashes, return_inverse=True, return_counts=True)
        if validation and not evaluated.any() and len(names) > 1:
            left = min(len(self) - 1, max(round(validation * len(self)), int(sizes.min())))
            chosen = np.zeros(len(names), bool)
            for name, size in enumerate(sizes.tolist()):
                chosen[name] = size <= left
                left -= size * int(chosen[name])
            evaluated = chosen[number]
        starts = np.cumsum([0, *map(len, self._ids)], dtype=np.int64)
        tokens, trained = _joined(self._ids, np.int32), _joined(self._trained, bool)
        return Examples(tokens, trained, starts, np.array(self._source, np.int32), evaluated, self.per_row)


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


class ChatSequences(Sequences):
    """Builds the tensors of sequences that are packed of whole chats, which don't see each other.

    A chat of tokens d is the inputs d[0] … d[n - 2] and the targets d[1] … d[n - 1], of which those count that are
    learnt.
    """

    def __init__(self, examples: Examples, rows: np.ndarray, seq_len: int, seed: int) -> None:
        self.examples, self.seq_len = examples, seq_len
        self.documents = Documents(examples.starts[:-1][rows], (examples.lengths[rows] - 1).astype(np.uint32))
        self.packing = BestFit(self.documents.lengths, seq_len, seed)
        self.packed, self._count = True, np.arange(seq_len)

    def build(self, rows: Sequence[Row]) -> Batch:
        shape, examples = (len(rows), self.seq_len), self.examples
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX)
        positions = np.empty(shape, np.int64)
        for row, pieces in enumerate(rows):
            first = 0
            for place, _, length in pieces:
                end = first + length
                tokens[row, first:end] = examples.tokens[place : place + length]
                following = slice(place + 1, place + 1 + length)
                learnt = examples.trained[following]
                targets[row, first:end] = np.where(learnt, examples.tokens[following], IGNORE_INDEX)
                positions[row, first:end] = self._count[:length]
                first = end
            positions[row, first:] = self._count[: self.seq_len - first]
        return {name: torch.from_numpy(x) for name, x in zip(NAMES, (tokens, targets, positions), strict=True)}

    def padding(self) -> Batch:
        return self.build([[]])


NAMES = ("tokens", "targets", "positions")


def joined(sequences: Iterable[tuple[np.ndarray, np.ndarray]], multiple: int = 1) -> Batch:
    """Sequences as one packed row ``[1, tokens]``: tokens, targets, positions, and "segments": the number of the
    sequence that each target is of, and that of none for padding to a multiple of ``multiple``."""
    parts: list[tuple[np.ndarray, ...]] = []
    number = 0
    for ids, trained in sequences:
        n = len(ids) - 1
        parts.append((ids[:-1], np.where(trained[1:], ids[1:], IGNORE_INDEX), np.arange(n), np.full(n, number)))
        number += 1
    if left := -sum(len(part[0]) for part in parts) % multiple:
        parts.append((np.zeros(left), np.full(left, IGNORE_INDEX), np.arange(left), np.full(left, number)))
    columns = (np.concatenate(column).astype(np.int64)[None] for column in zip(*parts, strict=True))
    return {name: torch.from_numpy(x) for name, x in zip((*NAMES, "segments"), columns, strict=True)}


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """``[count]``: the sums of ``values`` over the tokens of each segment; numbers of ``count`` and above are left
    out."""
    sums = values.new_zeros(count + 1)
    return sums.index_add(0, segments.flatten().clamp(max=count), values.flatten())[:count]
