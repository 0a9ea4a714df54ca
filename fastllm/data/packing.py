"""Which parts of which documents make up each training sequence, from the documents' lengths alone.

Documents are packed whole, by best fit; only one that is longer than the sequence is cut (Ding et al. 2024, Fewer
Truncations Improve Language Modeling, arXiv:2404.10830). Or they are concatenated, and cut wherever a sequence ends.
Either way each token is in one sequence of an epoch. The plan of an epoch is computed where it is asked for: memory is
4 to 12 bytes for each document, besides the lengths.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .permutation import key_of, mixed, permuted


class Pieces(NamedTuple):
    """Parts of documents, int64 arrays: those of a sequence stand one after the other, in their order in it."""

    row: np.ndarray  # which of the sequences that were asked for
    document: np.ndarray
    start: np.ndarray  # tokens of the document before the part
    length: np.ndarray


class Packing(Protocol):
    """A plan for any epoch: a pure function of the lengths, the seed and the epoch."""

    sequences: int  # of an epoch

    def pieces(self, sequences: np.ndarray, epoch: int) -> Pieces:
        """What is in each of ``sequences``, numbers below :attr:`sequences`."""
        ...


class Concatenated:
    """One row of all documents, in their order, cut every ``seq_len`` tokens.

    Each epoch begins at another token, and goes around: its last sequence ends where the first one begins.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int) -> None:
        self.seq_len, self.seed = seq_len, seed
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.tokens = int(self._ends[-1])
        self.sequences = -(-self.tokens // seq_len)

    def pieces(self, sequences: np.ndarray, epoch: int) -> Pieces:
        offset = key_of(self.seed, epoch) % self.tokens
        first = sequences * self.seq_len
        last = np.minimum(first + self.seq_len, self.tokens)
        # A sequence that goes beyond the end of the row has a second part, at its begin.
        begin, n = (first + offset) % self.tokens, last - first
        before = np.minimum(n, self.tokens - begin)
        begin = np.stack((begin, np.zeros_like(begin)), 1).ravel()
        end = begin + np.stack((before, n - before), 1).ravel()
        document = np.searchsorted(self._ends, begin, side="right")
        count = np.where(end > begin, np.searchsorted(self._ends, end) - document + 1, 0)
        part, document = _ranges(count, document)
        ends = self._ends[document]
        starts = np.where(document > 0, self._ends[document - 1], 0)
        low, high = np.maximum(begin[part], starts), np.minimum(end[part], ends)
        return Pieces(part // 2, document, low - starts, high - low)


class BestFit:
    """Whole documents in sequences of ``seq_len`` tokens, by best fit in decreasing order of their lengths.

    A longer document is cut into parts of ``seq_len`` and a shorter rest, its begin or its end: each epoch decides
    anew. What is packed together, too, changes with the epoch.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int) -> None:
        self.lengths, self.seq_len, self.seed = lengths, seq_len, seed
        rest = (lengths % seq_len).astype(np.uint16 if seq_len <= 2**16 else np.uint32)  # numpy sorts 16 bits faster
        self._counts = np.bincount(rest, minlength=seq_len)
        index = np.uint32 if len(lengths) < 2**32 else np.int64
        self._by_rest = np.argsort(rest, kind="stable")[self._counts[0] :].astype(index)
        self._counts[0] = 0
        self._first = np.cumsum(self._counts) - self._counts  # of each length in _by_rest
        # Sequences of one part of a cut document come first, the others after them.
        self._long = np.flatnonzero(lengths >= seq_len).astype(index)
        self._full_ends = np.cumsum(lengths[self._long] // seq_len, dtype=np.int64)
        self._full = int(self._full_ends[-1]) if len(self._full_ends) else 0
        self._bins = best_fit(self._counts, seq_len)
        self.sequences = self._full + self._bins.count

    def pieces(self, sequences: np.ndarray, epoch: int) -> Pieces:
        rows = np.arange(len(sequences))
        is_full = sequences < self._full
        full = self._full_pieces(rows[is_full], sequences[is_full], epoch)
        packed = self._packed_pieces(rows[~is_full], sequences[~is_full] - self._full, epoch)
        joined = [np.concatenate(parts) for parts in zip(full, packed, strict=True)]
        order = np.argsort(joined[0], kind="stable")
        return Pieces(*(part[order] for part in joined))

    def _full_pieces(self, rows: np.ndarray, numbers: np.ndarray, epoch: int) -> Pieces:
        place = np.searchsorted(self._full_ends, numbers, side="right")
        document = self._long[place].astype(np.int64)
        lengths = self.lengths[document].astype(np.int64)
        number = numbers - self._full_ends[place] + lengths // self.seq_len
        start = number * self.seq_len + np.where(self._rest_first(document, epoch), lengths % self.seq_len, 0)
        return Pieces(rows, document, start, np.full_like(start, self.seq_len))

    def _packed_pieces(self, rows: np.ndarray, numbers: np.ndarray, epoch: int) -> Pieces:
        row, length, slot = self._bins.contents(numbers)
        key = mixed(length.astype(np.uint64) ^ np.uint64(key_of(self.seed, epoch, 1)))
        slot = permuted(slot, self._counts[length], key)
        document = self._by_rest[self._first[length] + slot].astype(np.int64)
        before = self.lengths[document].astype(np.int64) - length
        start = np.where(self._rest_first(document, epoch), 0, before)
        return Pieces(rows[row], document, start, length)

    def _rest_first(self, document: np.ndarray, epoch: int) -> np.ndarray:
        """Whether the rest of each document is its begin."""
        return mixed(document.astype(np.uint64) ^ np.uint64(key_of(self.seed, epoch, 2))) & np.uint64(1) == 1


@dataclass(frozen=True)
class Bins:
    """Bins, of which many hold items of the same lengths: these are a group.

    Items of one length are told apart by their slot, from 0 to their number. Entry e says that each bin of its group
    holds ``times[e]`` items of ``length[e]``; those of the group's first bin have the slots from ``slot[e]`` on.
    """

    group: np.ndarray  # the first bin of each group, and the number of all bins
    entry: np.ndarray  # the first entry of each group, and the number of all entries
    length: np.ndarray
    times: np.ndarray
    slot: np.ndarray

    @property
    def count(self) -> int:
        return int(self.group[-1])

    def contents(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each item in the bins ``numbers``: the place of its bin in ``numbers``, its length and its slot."""
        group = np.searchsorted(self.group, numbers, side="right") - 1
        row, entry = _ranges(self.entry[group + 1] - self.entry[group], self.entry[group])
        times = self.times[entry]
        item, slot = _ranges(times, self.slot[entry] + (numbers - self.group[group])[row] * times)
        return row[item], self.length[entry][item], slot


class _Group(NamedTuple):
    bins: int
    fill: int  # the number of its last fill; -1: its bins are empty
    first: int  # which of that fill's bins its first one is


class _Fills:
    """What was put into bins: each time, the same into each bin of a group, after what the group had before."""

    def __init__(self) -> None:
        self._before = array("q")  # four numbers a fill: the fill before, its first bin of these, length, times
        self._slots = array("q")

    def add(self, group: _Group, length: int, times: int, slot: int) -> _Group:
        self._before.extend((group.fill, group.first, length, times))
        self._slots.append(slot)
        return _Group(group.bins, len(self._slots) - 1, 0)

    def entries(self, group: _Group, length: array[int], times: array[int], slot: array[int]) -> int:
        """Append the group's entries; how many there are."""
        _, fill, first = group
        before = len(slot)
        while fill >= 0:
            n = self._before[4 * fill + 3]
            length.append(self._before[4 * fill + 2])
            times.append(n)
            slot.append(self._slots[fill] + first * n)
            fill, first = self._before[4 * fill], self._before[4 * fill + 1] + first
        return len(slot) - before


def best_fit(counts: np.ndarray, capacity: int) -> Bins:
    """Pack ``counts[n]`` items of each length n, up to ``capacity``, by best fit in decreasing order.

    Each item goes into the bin with the least room that it fits into. This takes all items of a length, and all bins of
    a group, at once: the time depends on the number of different lengths, not on that of the items.
    """
    fills = _Fills()
    open_groups: dict[int, list[_Group]] = {}  # by the room that is left
    rooms: list[int] = []  # those of open_groups, in rising order
    closed: list[_Group] = []

    def put(group: _Group, room: int) -> None:
        if not room:
            closed.append(group)
            return
        if room not in open_groups:
            open_groups[room] = []
            insort(rooms, room)
        open_groups[room].append(group)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left, slot = int(counts[length]), 0
        while left:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                bins, fill, first = open_groups[room].pop()
                if not open_groups[room]:
                    del open_groups[room], rooms[place]
            else:
                room, fill, first = capacity, -1, 0
                bins = -(-left // (capacity // length))
            times = room // length  # the bin with the least room is the same one until nothing more fits into it
            filled = min(bins, left // times)
            if filled:
                put(fills.add(_Group(filled, fill, first), length, times, slot), room - times * length)
                slot, left = slot + filled * times, left - filled * times
            if filled < bins and left:  # one bin gets the last few
                put(fills.add(_Group(1, fill, first + filled), length, left, slot), room - left * length)
                filled, left = filled + 1, 0
            if filled < bins:
                put(_Group(bins - filled, fill, first + filled), room)
    groups = [*closed, *(group for room in rooms for group in open_groups[room])]
    length, times, slots = array("q"), array("q"), array("q")
    entries = [fills.entries(group, length, times, slots) for group in groups]
    return Bins(
        np.cumsum([0, *(group.bins for group in groups)]),
        np.cumsum([0, *entries]),
        *(np.frombuffer(numbers, np.int64) if numbers else np.empty(0, np.int64) for numbers in (length, times, slots)),
    )


def _ranges(counts: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``counts[i]`` numbers from ``first[i]`` on for each i, one after the other: the i of each, and the number."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner] + first[owner]
