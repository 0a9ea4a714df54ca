"""Batches for training: the protocol of a data source, and packed documents as its first implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .mixture import Mixture
from .packing import BestFit, Packing
from .permutation import key_of, permuted
from .token_data import Documents

IGNORE_INDEX = -100  # the target of a token that does not count

PLANNED = 256  # items of a run whose rows are computed together

Row = list[tuple[int, int, int]]  # parts of documents: place in the tokens, place in the document, length
Batch = dict[str, Tensor]  # CPU tensors by name; dimension 0 is the item, dimension 1 (where there is one) the token


class BatchSource(Protocol):
    """Items by their index. ``batch`` is a pure function of the index: any rank may read any item at any time.

    Of packed documents, "positions" ``[items, tokens]`` are those of the tokens in their documents, from 0 in each.
    """

    def batch(self, index: int, n: int) -> Batch:
        """Items ``index`` to ``index + n``."""
        ...

    def padding(self) -> Batch:
        """One item that does not count, for a rank that has none left in a micro-batch."""
        ...


class DataSource(BatchSource, Protocol):
    """What a run is trained on: items by their index in the run, for as many epochs as it takes.

    The items depend on the source's seed and the index alone. So a rank reads the items that it owns and no others,
    and a resumed run reads what it would have read.
    """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps to recognise the source: values that JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; raises UserError where this is another source."""
        ...


class TokenReader(Protocol):
    """Tokens by their place in one row: a :class:`fastllm.data.token_data.TokenData`."""

    @property
    def eos_id(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class Sequences:
    """Builds the tensors of sequences of documents: ``tokens``, ``targets`` and, packed, ``positions``.

    A document of tokens d, of which the last is the end-of-text token e, is the inputs e, d[0], d[1], … and the targets
    d[0], d[1], …, e. So each token is a target once, and the first one is predicted from e, as in generation. A part of
    a document begins with the token before it as its input.
    """

    def __init__(self, tokens: TokenReader, documents: Documents, packing: Packing, seq_len: int) -> None:
        self.tokens, self.documents, self.packing, self.seq_len = tokens, documents, packing, seq_len
        self.packed = isinstance(packing, BestFit)
        self._count = np.arange(seq_len)

    def rows(self, numbers: np.ndarray, epoch: int) -> list[Row]:
        """What is in the sequences ``numbers`` of an epoch."""
        row, document, start, length = self.packing.pieces(numbers, epoch)
        place = self.documents.starts[document] + start
        pieces = list(zip(place.tolist(), start.tolist(), length.tolist(), strict=True))
        ends = np.searchsorted(row, np.arange(len(numbers) + 1)).tolist()
        return [pieces[first:end] for first, end in pairwise(ends)]

    def build(self, rows: Sequence[Row]) -> Batch:
        """The tensors of sequences; they may be of other documents among the same tokens."""
        shape, eos = (len(rows), self.seq_len), self.tokens.eos_id
        tokens, targets, positions = np.full(shape, eos), np.full(shape, IGNORE_INDEX), np.empty(shape, np.int64)
        for row, pieces in enumerate(rows):
            first = 0
            for place, start, length in pieces:
                end = first + length
                ids = self.tokens.read(place - (start > 0), place + length)
                targets[row, first:end] = ids[-length:]
                tokens[row, end - len(ids) + 1 : end] = ids[:-1]
                positions[row, first:end] = self._count[:length]
                first = end
            positions[row, first:] = self._count[: self.seq_len - first]  # what is left is a document of its own
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return batch | {"positions": torch.from_numpy(positions)} if self.packed else batch

    def padding(self) -> Batch:
        """One sequence whose targets do not count."""
        tokens = torch.full((1, self.seq_len), self.tokens.eos_id)
        batch = {"tokens": tokens, "targets": torch.full_like(tokens, IGNORE_INDEX)}
        return batch | {"positions": torch.arange(self.seq_len)[None]} if self.packed else batch


class TrainingData:
    """The sequences of one or more sources, each once an epoch of its source, in an order that ``seed`` decides.

    Args:
        sources: what is trained on.
        seed: of the order.
        mixture: which source each item is of; None: there is one source.
        identity: by what, with the seed, a checkpoint recognises the data: names and values that JSON can hold.
    """

    def __init__(
        self,
        sources: Sequence[Sequences],
        seed: int,
        mixture: Mixture | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.sources, self.seed, self.mixture = sources, seed, mixture
        self.identity = dict(identity or {})
        self._plan = lru_cache(maxsize=2)(self._plan_block)

    def batch(self, index: int, n: int) -> Batch:
        rows: list[Row] = []
        while len(rows) < n:
            block, first = divmod(index + len(rows), PLANNED)
            rows += self._plan(block)[first : first + n - len(rows)]
        return self.sources[0].build(rows)

    def _plan_block(self, block: int) -> list[Row]:
        """Items ``block * PLANNED`` and so on, PLANNED of them: together they take little more time than one."""
        items = np.arange(block * PLANNED, (block + 1) * PLANNED)
        of, item = self.mixture.locate(items) if self.mixture else (np.zeros_like(items), items)
        rows: list[Row] = [[]] * PLANNED
        epoch, item = np.divmod(item, np.array([source.packing.sequences for source in self.sources])[of])
        for number, e in sorted(set(zip(of.tolist(), epoch.tolist(), strict=True))):
            source, here = self.sources[number], np.flatnonzero((of == number) & (epoch == e))
            chosen = permuted(item[here], source.packing.sequences, key_of(self.seed, number, e))
            for place, row in zip(here.tolist(), source.rows(chosen, e), strict=True):
                rows[place] = row
        return rows

    def padding(self) -> Batch:
        return self.sources[0].padding()

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        for key in own | {**state}:
            before, now = state.get(key), own.get(key)
            if before != now and key == "schedule":
                raise UserError(
                    f"the weights move over {before} sequences in the checkpoint and over {now} in this run: "
                    "continue with the same train.steps and train.global_batch_tokens"
                )
            if before != now:
                raise UserError(f"the checkpoint was trained on data of {key} {before}, this is {key} {now}")


class EvaluationData:
    """Up to ``max_tokens / seq_len`` sequences, evenly spaced over all of them."""

    def __init__(self, sequences: Sequences, max_tokens: int) -> None:
        self.sequences = sequences
        count = sequences.packing.sequences
        self._n = max(1, min(count, max_tokens // sequences.seq_len))
        self._numbers = np.arange(self._n) * count // self._n

    def __len__(self) -> int:
        return self._n

    def batch(self, index: int, n: int) -> Batch:
        return self.sequences.build(self.sequences.rows(self._numbers[index : index + n], 0))

    def padding(self) -> Batch:
        return self.sequences.padding()


def cu_seqlens_of(positions: Tensor) -> Tensor:
    """Where documents start and end in the tokens of ``positions`` ``[items, tokens]``, int32 ``[documents + 1]``.

    Empty documents at the end make it one of few lengths, so that torch.compile compiles few times.
    """
    starts = np.flatnonzero(positions.numpy() == 0)
    capacity = max(8, 1 << (len(starts) - 1).bit_length())
    cu_seqlens = np.full(capacity + 1, positions.numel(), np.int32)
    cu_seqlens[: len(starts)] = starts
    return torch.from_numpy(cu_seqlens)


def unigram_loss(counts: np.ndarray, targets: np.ndarray) -> float:
    """Nats per token that the token frequencies ``counts`` (each plus one) give ``targets``."""
    frequencies = (counts + 1) / (counts + 1).sum()
    return float(-np.log(frequencies)[targets].mean())
